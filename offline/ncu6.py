import os, sys
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.getcwd()+"/benchmarks")
import torch
import sweep_routed_attention as S
for rho in (.5,.25):
    saved=S.saved_of(*S.problem(2048,16,rho)); grad=torch.randn_like(saved.out)
    torch.cuda.synchronize()
    for k in ("query_grad","key_grad"): S.runner(k,saved,grad)()
    torch.cuda.synchronize()
