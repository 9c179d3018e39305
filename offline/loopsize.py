import re,collections,subprocess,sys
D="/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin/nvdisasm"
for c in sys.argv[1:]:
    lab={}; ins=[]
    for l in subprocess.run([D,"-c",c],capture_output=True,text=True).stdout.splitlines():
        m=re.match(r"(\.L_x_\d+):",l)
        if m: lab[m[1]]=len(ins)
        m=re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);",l)
        if m: ins.append(m[1])
    best=(0,0)
    for i,t in enumerate(ins):
        m=re.search(r"BRA `\((\.L_x_\d+)\)",t)
        if m and m[1] in lab and lab[m[1]]<i and i-lab[m[1]]>best[1]-best[0]: best=(lab[m[1]],i)
    k=collections.Counter(re.sub(r"^@!?U?P\d+ ","",t).split()[0].split(".")[0] for t in ins[best[0]:best[1]+1])
    print(c.split("/")[-1],"loop",best[1]-best[0]+1,dict(k.most_common(14)))
