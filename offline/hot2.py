import csv,sys,re
a,b=int(sys.argv[1]),int(sys.argv[2]); warps=int(sys.argv[3]); step=int(sys.argv[4])
rows=list(csv.reader(open('ncu_source.txt').read().splitlines()[a:b])); h=rows[0]; I=h.index("Instructions Executed"); S=h.index("# Samples"); src=h.index("Source")
rs=[r for r in rows[1:] if len(r)>S]; samp=sum(int(r[S]) for r in rs)
for i in range(0,len(rs),step):
    seg=rs[i:i+step]; s=sum(int(r[S]) for r in seg)/samp*100
    top=sorted(range(len(seg)),key=lambda j:-int(seg[j][S]))[:3]
    if s>1: print(i, f"{s:.1f}%", "exec",[round(int(seg[0][I])/warps,2),round(int(seg[-1][I])/warps,2)], [(i+j,re.sub(r"\s+"," ",seg[j][src])[:44],f"{int(seg[j][S])/samp*100:.1f}") for j in top if int(seg[j][S])/samp*100>0.4])
