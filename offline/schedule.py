import random, statistics as st, sys
exec(open("/tmp/sim.py").read().split("for name,T")[0])
def ordr(B,per,ex,rem):
    out=[]; w=per<<ex
    for number in range(B):
        at=number-rem
        if number<rem: out.append(B-1-number); continue
        g=at//w; wi=at-g*w; pl=wi>>ex; s=wi&((1<<ex)-1)
        out.append(B-rem-(g+1)*w+s*per+(per-pl)%per)
    return out
def reserve(B,per,G,lo,m):
    G=min(G,B//per); w=per*G
    A=[b for b in range(B) if not (b<w and lo<=b%per<lo+m)][::-1]
    L=[s*per+j for j in range(lo+m-1,lo-1,-1) for s in range(G)]
    return A+L
for name,T,S,rho,fix,tile,spread in (("fwd",2048,16,.25,1.3,128,0),("fwd",2048,16,.25,1.3,128,.1),("fwd",2048,16,.25,1.3,128,.25),("fwd",2048,16,.5,1.3,128,0),("fwd",2048,16,.5,1.3,128,.1),("fwd",2048,16,.5,1.3,128,.25)):
    acc={}
    for seed in range(12):
        random.seed(seed)
        shares=[rho*(1+spread*random.gauss(0,1)) for _ in range(S)]
        m=sum(shares)/S; shares=[x*rho/m for x in shares]
        pos=[(s,p) for s in range(S) for p in range(T) if random.random()<shares[s]]
        R=-(-int(1.05*rho*S*T)//64)*64; pos=pos[:R]
        B=-(-R//64); dur=[]
        for b in range(B):
            rows=pos[b*64:(b+1)*64]
            if not rows: dur.append(1.0); continue
            dur.append(fix+-(-(rows[-1][0]*T+rows[-1][1]+1-rows[0][0]*T)//tile))
        ideal=sum(dur)*16/396
        def rec(n,o):
            assert sorted(o)==list(range(B)); acc.setdefault(n,[]).append(sim(o,dur,16)[0]/ideal)
        rec("plain",list(range(B))[::-1])
        per=max(1,R//(64*S))
        for ex in (1,2,3): rec(f"G{1<<ex}",ordr(B,per,ex,B%(per<<ex)))
        for G in (2,4,8):
            rec(f"R{G}",reserve(B,per,G,per//4,max(1,per*3//8)))
        rec("LPT",sorted(range(B),key=lambda b:-dur[b]))
    print(name,T,rho,spread,{k:(round(st.mean(v),3),round(max(v),3)) for k,v in acc.items()})
