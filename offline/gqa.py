import sys
exec(open("/tmp/off/offline/asm.py").read().replace('exec(sys.argv[2])',''))
from chiar_megatron.operators.kernels.rotated_attention import rotated_attention
import torch
def go(n,g,size,T=256):
    a=(torch.empty(T,size//2),)*2; r=(torch.zeros(mc.ROWS,dtype=torch.int32),)*2
    rotated_attention(mc.memory(mc.ROWS,n,size),mc.memory(mc.TOKENS,g,2,size),a,r,bias=mc.memory((n+2*g)*size)).sum().backward()
D=os.path.dirname(PT)
for n,g,size in ((16,4,64),(8,2,128),(16,1,64)):
    count.clear(); go(n,g,size)
    for name in ("_forward_kernel","_query_gradient_kernel","_key_gradient_kernel"):
        base=f"{out}/{name}_1"
        print((n,g,size),name,"arrive",subprocess.run(f"{D}/nvdisasm -c {base}.cubin | grep -c WARPGROUP.ARRIVE",shell=True,capture_output=True,text=True).stdout.strip(),
              "C7515" in subprocess.run([PT,"-v","-arch=sm_90a",f"{base}.ptx","-o","/dev/null"],capture_output=True,text=True).stderr, flush=True)
