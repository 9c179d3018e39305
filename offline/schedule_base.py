import heapq, random
def sim(order, dur, heads, slots=396):
    h=[0.0]*slots; heapq.heapify(h)
    for b in order:
        for _ in range(heads):
            t=heapq.heappop(h); heapq.heappush(h,t+dur[b])
    return max(h), sum(dur)*heads/slots
def order(B,per,ex,rem):
    out=[]
    w=per<<ex
    for number in range(B):
        at=number-rem
        if number<rem: out.append(B-1-number); continue
        g=at//w; wi=at-g*w
        out.append(B-rem-(g+1)*w+(wi&((1<<ex)-1))*per+(per-(wi>>ex))%per)
    return out
for name,T,S,rho,fix,tile in (("dq",2048,16,.25,4,64),("dq",2048,16,.5,4,64),("fwd",2048,16,.25,1.3,128),("fwd",2048,16,.5,1.3,128),("dq",8192,4,.25,4,64),("dq",8192,4,.5,4,64),("dq",256,128,.5,4,64)):
    random.seed(1)
    pos=[(s,p) for s in range(S) for p in range(T) if random.random()<rho]
    R=-(-int(1.05*rho*S*T)//64)*64; pos=pos[:R]
    B=-(-R//64); dur=[]
    for b in range(B):
        rows=pos[b*64:(b+1)*64]
        if not rows: dur.append(1.0); continue
        lo=rows[0][0]*T; hi=rows[-1][0]*T+rows[-1][1]
        dur.append(fix+-(-(hi+1-lo)//tile))
    plain=list(range(B))[::-1]
    for heads in (16,):
        p0=sim(plain,dur,heads)
        res=[]
        for prog in (1,256,384,512,1024,2048):
            per=max(1,R//(64*S)); tog=min(S,max(1,prog//(per*heads))); ex=tog.bit_length()-1; rem=B%(per<<ex)
            o=order(B,per,ex,rem); assert sorted(o)==list(range(B))
            res.append((prog,1<<ex,round(sim(o,dur,heads)[0]/p0[1],3)))
        print(name,T,rho,"plain",round(p0[0]/p0[1],3),res)
