import sys
exec(open("/tmp/off/offline/asm.py").read().replace('exec(sys.argv[2])',''))
from chiar_megatron.operators.kernels.routed_attention import routed_attention
def plain(size=64):
    n=16
    q=mc.memory(mc.ROWS,n,size); kv=mc.memory(mc.TOKENS,n,2,size)
    ranges=(torch.zeros(mc.ROWS,dtype=torch.int32),torch.zeros(mc.ROWS,dtype=torch.int32))
    routed_attention(q,kv[:,:,0],kv[:,:,1],*ranges).sum().backward()
import torch
plain()
