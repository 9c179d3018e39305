import re,sys
def load(p):
    out={};cur=None
    for l in open(p):
        if l.startswith("## "): cur=l[3:].strip(); out[cur]={"_":[]}; continue
        m=re.match(r"\s+([\d.]+) ms\s+([\d.]+)%\s+([\d.]+)x\s+(.*)",l)
        if m and cur: out[cur].setdefault(m[4][:70],[0,0]); out[cur][m[4][:70]][0]+=float(m[1]); out[cur][m[4][:70]][1]+=float(m[3])
        elif "ms a step" in l and cur: out[cur]["_"].append(l.strip()[:60])
    return out
a,b=load(sys.argv[1]),load(sys.argv[2])
for side in a:
    if side not in b: continue
    print("##",side,a[side]["_"],b[side]["_"])
    A,B=a[side],b[side]
    keys=[k for k in {**A,**B} if k!="_"]
    def g(d): 
        r={}
        for k,v in d.items():
            if k=="_": continue
            n="nvjet" if k.startswith("nvjet") else "cudnn" if "cudnn" in k else "multi_tensor" if "multi_tensor" in k else k
            r.setdefault(n,[0,0]); r[n][0]+=v[0]; r[n][1]+=v[1]
        return r
    A,B=g(A),g(B)
    for k in sorted({**A,**B},key=lambda k:-max(A.get(k,[0])[0],B.get(k,[0])[0]))[:30]:
        x,y=A.get(k,[0,0]),B.get(k,[0,0])
        print(f"  {x[0]:8.3f} ({x[1]:5.0f})  {y[0]:8.3f} ({y[1]:5.0f})  {y[0]-x[0]:+7.3f}  {k}")
