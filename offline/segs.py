import re,sys,subprocess,collections
D="/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin/nvdisasm"
def loop(cubin):
    lab={}; ins=[]
    for l in subprocess.run([D,"-c",cubin],capture_output=True,text=True).stdout.splitlines():
        m=re.match(r"(\.L_x_\d+):",l)
        if m: lab[m[1]]=len(ins)
        m=re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);",l)
        if m: ins.append(m[1])
    best=(0,0)
    for i,t in enumerate(ins):
        m=re.search(r"BRA `\((\.L_x_\d+)\)",t)
        if m and m[1] in lab and lab[m[1]]<i and i-lab[m[1]]>best[1]-best[0]: best=(lab[m[1]],i)
    return ins[best[0]:best[1]+1]
a,b=(loop(c) for c in sys.argv[1:3])
op=lambda t:re.sub(r"^@!?U?P\d+ ","",t).split()[0]
A,B=collections.Counter(map(op,a)),collections.Counter(map(op,b))
print(len(a),len(b)); print({k:(A[k],B[k]) for k in sorted({**A,**B}) if A[k]!=B[k]})
if len(sys.argv)>3:
    for t in b: print(t)
