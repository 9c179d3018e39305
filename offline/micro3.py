import os, sys, time
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.getcwd()+"/benchmarks")
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
T0=time.time()
import torch
import sweep_routed_attention as S
from chiar_megatron.operators.kernels import rotary, bias_gelu as G, spectral as P
T=True; dev, bf = "cuda", torch.bfloat16
JOBS=[]
for k,c in {"entropy":[(1,4,8,0),(1,4,10,0),(2,3,7,0),(2,4,8,128),(2,3,8,120),(2,3,10,96),(2,2,8,128)],
            "mixing_subset":[(1,3,8,0),(2,3,5,0),(2,3,6,168),(2,3,8,128),(2,2,6,160)],
            "backward_subset":[(1,4,8,0),(2,3,4,0),(2,4,4,0),(2,2,4,0),(2,3,5,200),(2,3,6,168),(2,3,8,128)],
            "entropy_and_mixing":[(1,3,8,0),(2,3,4,0),(2,3,5,200),(2,3,6,168),(2,3,8,128)],
            "backward":[(1,3,8,0),(2,3,4,0),(2,3,5,200),(2,3,6,168)]}.items():
    JOBS += [("spectral",k,x) for x in c]
JOBS += [("gelu","forward",x) for x in ((8,2,4),(4,4,4),(4,2,4),(2,4,4),(8,1,4),(4,1,4),(8,2,8),(16,1,8))]
JOBS += [("gelu","backward",x) for x in ((2,256,4),(2,512,4),(4,256,4),(1,512,4),(2,264,4),(4,264,8),(2,528,4))]
JOBS += [("rotary",k,x) for k in ("turn","join") for x in ((32,8),(32,4),(64,2),(64,4),(32,16))]
for n in (256,2048):
    for k,c in {"forward":[(64,128,4,2,1,T,168),(64,64,4,3,1,T,128),(64,64,4,3,2),(64,64,4,3,2,False,128)],
                "query_grad":[(64,64,4,3,1,T),(64,64,4,2,1,T,128),(64,64,4,3,1,T,128),(64,32,4,4,1,T,128),(64,32,4,3,1,T)],
                "key_grad":[(32,64,4,3,1,T,168),(32,64,4,2,1,T,168),(32,64,4,4,1,T,168),(32,64,4,3,1,T),(32,64,4,3,1,T,128),(64,64,4,2,1,T),(32,128,8,2,1,T)]}.items():
        JOBS += [(n,k,x) for x in c]
data={}
def spectral(kernel, t):
    if "x" not in data:
        data["x"]=torch.randn(32768,1024,device=dev,dtype=bf); data["g"]=torch.randn(32768,1024,device=dev,dtype=bf); data["w"]=torch.randn(1024,device=dev,dtype=bf)
        data["rows"]=torch.randperm(32768,device=dev)[:16384].sort().values.int(); data["n"]=torch.tensor([16384],device=dev,dtype=torch.int32); data["dx"]=torch.empty_like(data["x"])
    x,g,w,rows,n,dx=(data[i] for i in ("x","g","w","rows","n","dx")); t=P.Tuning(*t)
    return {"entropy":lambda:P.spectral_entropy(x,tuning=t),"mixing_subset":lambda:P.mix(x,w,rows,n,"bf16",t),"backward_subset":lambda:P.mix_backward(dx,x,w,(rows,n),dx,"bf16",t),
            "entropy_and_mixing":lambda:P._both_op(x,w,1.0,"bf16",t),"backward":lambda:P.mix_backward(g,x,w,(None,None),dx,"bf16",t)}[kernel]
def gelu(kernel, t):
    if "u" not in data: data["u"]=torch.randn(32768,4096,device=dev,dtype=bf); data["du"]=torch.randn(32768,4096,device=dev,dtype=bf); data["b"]=torch.randn(4096,device=dev,dtype=bf)
    import triton
    x,g,b=data["u"],data["du"],data["b"]; n,f=x.shape; y=torch.empty_like(x)
    if kernel=="forward":
        fr,bl,w=t
        return lambda: G._forward_kernel[(triton.cdiv(f,1024),triton.cdiv(n,fr*bl))]((x,b,y),n,f,True,True,fr,1024,bl,num_warps=w)
    br,ch,w=t; sums=torch.empty(ch,f,device=dev)
    return lambda: G._backward_kernel[(triton.cdiv(f,1024),ch)]((g,x,b,y,sums),n,f,True,True,br,1024,num_warps=w)
def rot(kernel, t):
    rotary.SHARE_BLOCK, rotary.TILES = t
    R,N,D,K,s = 17216,16,64,32768,2048
    if "kv" not in data:
        data["q"]=torch.randn(R,N,D,device=dev,dtype=bf); data["kv"]=torch.randn(K,N,2,D,device=dev,dtype=bf); data["last"]=torch.sort(torch.randint(K,(R,),device=dev)).values.int()
        data["tab"]=(torch.rand(s,D//2,device=dev),torch.rand(s,D//2,device=dev)); data["bias"]=torch.zeros(3*N*D,device=dev,dtype=bf); data["tq"]=torch.empty_like(data["q"]); data["tk"]=torch.empty(K,N,D,device=dev,dtype=bf)
        data["grads"]=[torch.randn(K//s,s,N,1,D,device=dev,dtype=bf), torch.randn(K//s,s,N,D,device=dev,dtype=bf), torch.randn(K//s,s,N,D,device=dev,dtype=bf)]
    if kernel=="turn": return lambda: rotary.turn((data["q"],data["tq"]),(data["kv"][:,:,0],data["tk"]),data["last"],data["tab"],1.0)
    return lambda: rotary.join_rotated_back(data["grads"],*data["tab"],data["bias"])
def attention(n, kernel, t):
    if ("a",n) not in data:
        saved=S.saved_of(*S.problem(n,32768//n,0.5)); data["a",n]=(saved,torch.randn_like(saved.out))
    S.tiles.OVERRIDES[kernel]=S.tiles.Tuning(*t)
    saved,grad=data["a",n]
    r=S.runner(kernel,saved,grad)
    if kernel!="forward": S.tiles.OVERRIDES.clear()
    return r
def make(job):
    a,k,t=job
    return spectral(k,t) if a=="spectral" else gelu(k,t) if a=="gelu" else rot(k,t) if a=="rotary" else attention(a,k,t)
def once(job):
    try:
        make(job)(); torch.cuda.synchronize(); S.tiles.OVERRIDES.clear(); return None
    except Exception as e: return f"{type(e).__name__} {str(e)[:100]}"
def main():
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool: bad=dict(zip(JOBS,pool.map(once,JOBS)))
    print("compiled",round(time.time()-T0),"s",flush=True)
    a=torch.randn(8192,8192,device=dev,dtype=bf); b=torch.randn(8192,8192,device=dev,dtype=bf)
    for _ in range(300): a@b
    last=None
    for job in JOBS:
        if bad[job]: print(job,bad[job]); continue
        try:
            call=make(job); call(); ev=[]
            for _ in range(14):
                a@b; s,e=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True); s.record(); call(); e.record(); ev.append((s,e))
            torch.cuda.synchronize(); t=sorted(s.elapsed_time(e) for s,e in ev)[7]
        except Exception as e: print(job,"failed",str(e)[:80]); continue
        S.tiles.OVERRIDES.clear()
        if (job[0],job[1])!=last: print(f"\n{job[0]} {job[1]}:",end=" "); last=(job[0],job[1])
        print(f"{','.join(str(int(i)) for i in job[2] if i is not None)}={t:.4f}",end="  ",flush=True)
    print("\n",round(time.time()-T0),"s")
if __name__=="__main__": main()
