import re,sys,subprocess,collections
D="/tmp/v211/lib/python3.11/site-packages/triton/backends/nvidia/bin/nvdisasm"
def flow(cubin):
    out=subprocess.run([D,"-c",cubin],capture_output=True,text=True).stdout
    seg=collections.Counter(); n=0; lines=[]
    def flush(tag):
        nonlocal seg,n
        keep={k:v for k,v in seg.items() if k in("FSEL","HGMMA","MUFU","ISETP","LDG","LDL","STL","SHFL","BAR","SEL","PLOP3")}
        lines.append(f"   [{n}] {keep}   {tag}"); seg=collections.Counter(); n=0
    for l in out.splitlines():
        m=re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);",l)
        if m:
            t=m[1]; op=re.sub(r"^@!?U?P\d+ ","",t).split()[0].split(".")[0]; seg[op]+=1; n+=1
            if op=="BRA": flush(t)
        elif l.startswith(".L_x"): flush(l)
    flush("end")
    return lines
for c in sys.argv[1:]:
    print(c)
    for l in flow(c):
        if not re.match(r"   \[\d\] ",l): print(l)
