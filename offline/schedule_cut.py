import random, statistics as st
exec(open("/tmp/sim.py").read().split("for name,T")[0])
def run(T,S,rho,fix,tile,spread,seed):
    random.seed(seed)
    shares=[rho*(1+spread*random.gauss(0,1)) for _ in range(S)]; m=sum(shares)/S
    rows=[[p for p in range(T) if random.random()<x*rho/m] for x in shares]
    n=sum(map(len,rows)); R=-(-int(1.05*rho*S*T)//64)*64
    pairs=sum(p+1 for r in rows for p in r)
    # now
    flat=[(s,p) for s,r in enumerate(rows) for p in r][:R]
    old=[];oldt=0
    for b in range(-(-R//64)):
        x=flat[b*64:(b+1)*64]
        if not x: old.append(1.0); continue
        k=-(-((x[-1][0]-x[0][0])*T+x[-1][1]+1)//tile); oldt+=k; old.append(fix+k)
    new=[];newt=0;per=[]
    for r in rows:
        e=len(r); mine=[]
        while e>0:
            k=-(-(r[e-1]+1)//tile); newt+=k; mine.append(fix+k); e-=64
        per.append(mine)
    pad=-(-max(0,R-n)//64)
    flat_order=[1.0]*pad+[d for mine in per[::-1] for d in mine]
    G=max(1,512//max(1,(len(flat_order)-pad)//S*16))
    G=min(G,S)
    inter=[1.0]*pad
    for g in range(-(-S//G)-1,-1,-1):
        grp=per[g*G:(g+1)*G]
        for k in range(max(map(len,grp))):
            for mine in grp:
                if k<len(mine): inter.append(mine[k])
    empt=(-(-R//64)+S+1)-len(inter)
    def mk(d): 
        return sim(range(len(d)),d,16)[0]
    a=mk(old[::-1]); b=mk(flat_order+[.5]*empt); c=mk(inter+[.5]*empt)
    return oldt*64*tile/pairs,newt*64*tile/pairs,b/a,c/a
for T,S,rho,fix,tile in ((256,128,.5,1.3,128),(256,128,.25,1.3,128),(2048,16,.5,1.3,128),(2048,16,.25,1.3,128),(2048,16,.5,4,64),(2048,16,.25,4,64),(8192,4,.25,4,64)):
    for sp in (0,.15):
        x=[run(T,S,rho,fix,tile,sp,s) for s in range(6)]
        print(T,rho,tile,sp,[round(st.mean(v),3) for v in zip(*x)])
