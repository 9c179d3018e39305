import os, sys
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.getcwd()+"/benchmarks")
import torch
import sweep_routed_attention as S
from chiar_megatron.operators.kernels import rotary, bias_gelu as G
for case in ((256,128,0.5),(2048,16,0.5)):
    saved = S.saved_of(*S.problem(*case)); grad = torch.randn_like(saved.out)
    for kernel in ("query_grad","key_grad"):
        S.runner(kernel, saved, grad)()
    torch.cuda.synchronize()
x, bias = torch.randn(32768,4096,device="cuda",dtype=torch.bfloat16), torch.randn(4096,device="cuda",dtype=torch.bfloat16)
G._backward_op(G._forward_op(x,bias),x,bias)
torch.cuda.synchronize()
