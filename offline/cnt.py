import re,sys,subprocess,collections
D="/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin/nvdisasm"
for c in sys.argv[1:]:
    lab={}; ins=[]
    for l in subprocess.run([D,"-c",c],capture_output=True,text=True).stdout.splitlines():
        m=re.match(r"(\.L_x_\d+):",l)
        if m: lab[m[1]]=len(ins)
        m=re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);",l)
        if m: ins.append(m[1])
    loops=[]
    for i,t in enumerate(ins):
        m=re.search(r"BRA(?:\.U)? .*`\((\.L_x_\d+)\)",t)
        if m and m[1] in lab and lab[m[1]]<i and i-lab[m[1]]>40: loops.append((lab[m[1]],i))
    print(c.split("/")[-1],"total",len(ins),"loops",[(a,b,b-a+1) for a,b in loops])
