import os, sys, json
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.getcwd()+"/benchmarks")
import torch
import sweep_routed_attention as S
from chiar_megatron.operators.kernels import rotated_attention as RA
mode,name=sys.argv[1:3]
dev,bf="cuda",torch.bfloat16
a=torch.randn(8192,8192,device=dev,dtype=bf); b=torch.randn(8192,8192,device=dev,dtype=bf)
def timed(call,n=30):
    call()
    if mode=="compile": torch.cuda.synchronize(); return 0.0
    ev=[]
    for _ in range(n):
        a@b; s,e=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True); s.record(); call(); e.record(); ev.append((s,e))
    torch.cuda.synchronize(); return sorted(s.elapsed_time(e) for s,e in ev)[n//2]
out={}
T=True
V={"forward":[(128,64,8,3,1,False),(128,64,8,3,1,T),(128,64,8,2,1,T),(128,128,8,2,1,T),(64,64,4,2,1,T),(64,64,4,3,1,T),(64,128,4,2,1,T)],
   "query_grad":[(128,64,8,2,1,False),(128,64,8,2,1,T),(64,64,4,2,1,T),(128,64,8,3,1,T),(64,32,4,3,1,T)],
   "key_grad":[(32,128,8,2,1,False),(32,128,8,2,1,T),(32,64,4,2,1,T),(32,128,8,3,1,T),(64,128,8,2,1,T)]}
if name.startswith("d128"):
    S.N,S.D=8,128
    k=name[5:]
    for t in (2048,8192):
        saved=S.saved_of(*S.problem(t,32768//t,.5)); grad=torch.randn_like(saved.out)
        for v in V[k]:
            S.tiles.OVERRIDES[k]=S.tiles.Tuning(*v)
            try: out[f"{k} {t} {v}"]=timed(S.runner(k,saved,grad))
            except Exception as e: out[f"{k} {t} {v}"]=str(e)[:60]
            S.tiles.OVERRIDES.clear()
else:
    for t,rho in ((256,.5),(2048,.5),(2048,.25),(8192,.5)):
        q,k,v,first,last=S.problem(t,32768//t,rho)
        saved=S.saved_of(q,k,v,first,last); grad=torch.randn_like(saved.out)
        for kernel in ("forward","query_grad","key_grad"):
            out[f"{t} {rho} {kernel}"]=timed(S.runner(kernel,saved,grad))
        kv=torch.randn(32768,16,2,64,device=dev,dtype=bf); angles=list(torch.rand(2,t,32,device=dev)); bias=torch.zeros(3*1024,device=dev,dtype=bf)
        o,lse,tq,tk=RA._forward_op(q,kv,[first,last],angles,None,0.0)
        back=lambda: RA._backward_op(grad,kv,[o,lse,tq,tk],[first,last],angles,None,0.0,bias)
        back(); torch.cuda.synchronize()
        if mode=="time":
            g=torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): back()
            out[f"{t} {rho} backward"]=timed(g.replay)
if mode=="time": print(json.dumps({"tree":name,**{k:(round(v,4) if isinstance(v,float) else v) for k,v in out.items()}}))
