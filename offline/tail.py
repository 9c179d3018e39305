import re,sys,subprocess,collections
D="/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin/nvdisasm"
c=sys.argv[1]; want=sys.argv[2:]
seg=[];out=[]
for l in subprocess.run([D,"-c",c],capture_output=True,text=True).stdout.splitlines():
    m=re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);",l)
    if m:
        seg.append(m[1]); 
        op=re.sub(r"^@!?U?P\d+ ","",m[1]).split()[0].split(".")[0]
        if op=="BRA": out.append(seg); seg=[]
    elif l.startswith(".L_x"): out.append(seg); seg=[]
out.append(seg)
for s in out:
    if len(s)>90:
        k=collections.Counter(re.sub(r"^@!?U?P\d+ ","",t).split()[0].split(".")[0] for t in s)
        print(len(s),dict(k.most_common(22)))
