import csv,sys,re,collections
a,b=int(sys.argv[1]),int(sys.argv[2]); warps=int(sys.argv[3])
lines=open('ncu_source.txt').read().splitlines()[a:b]
rows=list(csv.reader(lines)); h=rows[0]; I=h.index("Instructions Executed"); S=h.index("# Samples"); src=h.index("Source")
c=collections.Counter(); s=collections.Counter(); ops=collections.defaultdict(collections.Counter)
for r in rows[1:]:
    if len(r)<=S: continue
    v=round(int(r[I])/warps,2); c[v]+=1; s[v]+=int(r[S]); ops[v][re.sub(r"^@!?U?P\d+ ","",r[src].strip()).split()[0].split(".")[0]]+=1
t=sum(s.values())
for v in sorted(c,key=lambda v:-v*c[v])[:6]: print(v,"times:",c[v],"instructions, samples",f"{s[v]/t*100:.1f}%",dict(ops[v].most_common(24)))
