import subprocess, sys, tempfile, os, re
import tests.unit.machine_code as mc
from triton.runtime.jit import JITFunction
import triton
PT=os.path.join(os.path.dirname(triton.__file__),"backends/nvidia/bin/ptxas")
out=sys.argv[1]; os.makedirs(out,exist_ok=True)
mc.check_launcher=lambda k: None
run=JITFunction.run
from triton.runtime import driver
driver.set_active(mc.Driver())
count={}
def compiled(self,*a,grid,warmup,**o):
    k=run(self,*a,grid=grid,warmup=True,**o)
    n=self.fn.__name__; count[n]=count.get(n,0)+1
    base=f"{out}/{n}_{count[n]}"
    for kind in ("ttgir","ptx"): open(f"{base}.{kind}","w").write(k.asm[kind])
    open(f"{base}.cubin","wb").write(k.asm["cubin"])
    e=subprocess.run([PT,"-v","-arch=sm_90a",f"{base}.ptx","-o","/dev/null"],capture_output=True,text=True).stderr
    print(n, re.findall(r"Used (\d+) registers",e), re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads",e), "smem", k.metadata.shared, "convert", k.asm["ttgir"].count("convert_layout"), "wgmma", k.asm["ptx"].count("wgmma.mma"), flush=True)
    return k
JITFunction.run=compiled
mc.ROWS, mc.TOKENS, mc.SEQUENCE, mc.HEADS = 17216, 32768, 256, 16
exec(sys.argv[2])
