"""Registers, spills and shared memory of attention's kernels at the 400M model's sizes, by ptxas.

    PYTHONPATH=. /tmp/v211/bin/python -W ignore offline/registers.py        (with Triton 3.6)
"""
import subprocess, sys, tempfile, os, re
sys.argv=["x"]
import tests.unit.machine_code as mc
from triton.runtime.jit import JITFunction
import triton
PT=os.path.join(os.path.dirname(triton.__file__),"backends/nvidia/bin/ptxas")
def resources(kernel,name):
    with tempfile.NamedTemporaryFile("w",suffix=".ptx",delete=False) as f: f.write(kernel.asm["ptx"])
    out=subprocess.run([PT,"-v","-arch=sm_90a",f.name,"-o","/dev/null"],capture_output=True,text=True).stderr
    reg=re.findall(r"Used (\d+) registers",out); sp=re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads",out); st=re.findall(r"(\d+) bytes stack",out)
    maxn=re.findall(r"\.maxnreg (\d+)",kernel.asm["ptx"]); 
    print(name,"regs",reg,"spill",sp,"stack",st,"maxnreg",maxn,"ntid",re.findall(r"\.reqntid (\d+)",kernel.asm["ptx"]),"smem",kernel.metadata.shared,flush=True)
mc.check_launcher=lambda k: None
run=JITFunction.run
from triton.runtime import driver
driver.set_active(mc.Driver())
def compiled(self,*a,grid,warmup,**o):
    k=run(self,*a,grid=grid,warmup=True,**o)
    resources(k,self.fn.__name__); return k
JITFunction.run=compiled

mc.ROWS, mc.TOKENS, mc.SEQUENCE, mc.HEADS = 17216, 32768, 256, 16
mc.attention(64)
