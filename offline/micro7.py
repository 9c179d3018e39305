import os, sys
sys.path.insert(0, os.getcwd()); sys.path.insert(0, os.getcwd()+"/benchmarks")
import torch
import sweep_routed_attention as S
mode, part, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dev,bf,T="cuda",torch.bfloat16,True
V={128:{"forward":[(64,64,4,3,1,T),(64,64,4,2,1,T),(64,128,4,2,1,T),(128,64,8,3,1,T),(128,64,8,2,1,T),(128,128,8,2,1,T),(128,64,8,4,1,T),(64,128,8,2,1,T),(64,64,4,3,1,T,168),(64,128,4,1,1,T)],
   "query_grad":[(64,64,4,2,1,T),(64,64,4,3,1,T),(128,64,8,2,1,T),(128,64,8,3,1,T),(64,128,8,2,1,T),(64,64,8,2,1,T),(128,128,8,1,1,T),(64,64,4,1,1,T)],
   "key_grad":[(32,64,4,2,1,T),(32,64,4,3,1,T),(64,64,4,2,1,T),(64,64,8,2,1,T),(64,128,8,2,1,T),(32,128,8,2,1,T),(32,128,8,3,1,T),(64,128,8,1,1,T),(64,64,8,3,1,T),(64,128,8,2,1,T,224)]},
 64:{"forward":[(64,128,4,2,1,T,168),(128,64,8,3,1,T),(128,128,8,2,1,T)],
   "query_grad":[(64,64,4,3,1,T),(128,64,8,3,1,T),(128,64,8,2,1,T),(128,128,8,2,1,T)]}}
flat=[(d,k,v) for d in V for k in V[d] for v in V[d][k]]
def size(d): S.D=d; S.N=1024//d
if mode=="compile":
    for i,(d,k,v) in enumerate(flat):
        if i%parts==part:
            size(d); saved=S.saved_of(*S.problem(512,2,.5)); grad=torch.randn_like(saved.out)
            S.tiles.OVERRIDES[k]=S.tiles.Tuning(*v)
            try: S.runner(k,saved,grad)(); torch.cuda.synchronize()
            except Exception as e: print(d,k,v,str(e)[:100])
            S.tiles.OVERRIDES.clear()
    sys.exit()
a=torch.randn(4096,4096,device=dev,dtype=bf); b=torch.randn(4096,4096,device=dev,dtype=bf)
def timed(call,n=25):
    call(); ev=[]
    for _ in range(n):
        a@b; s,e=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True); s.record(); call(); e.record(); ev.append((s,e))
    torch.cuda.synchronize(); return sorted(s.elapsed_time(e) for s,e in ev)[n//2]
cases=((2048,.5),(2048,.25),(8192,.5),(8192,.25))
table={}
for t,rho in cases:
  for d in V:
    size(d)
    saved=S.saved_of(*S.problem(t,32768//t,rho)); grad=torch.randn_like(saved.out)
    for dd,k,v in flat:
        if dd!=d: continue
        S.tiles.OVERRIDES[k]=S.tiles.Tuning(*v)
        try: table.setdefault((d,k,v),[]).append(round(timed(S.runner(k,saved,grad)),4))
        except Exception as e: table.setdefault((d,k,v),[]).append(str(e)[:30])
        S.tiles.OVERRIDES.clear()
print(cases)
for k,v in table.items(): print(*k,v,flush=True)
