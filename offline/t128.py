import sys
sys.argv=["x",sys.argv[1],"pass"]
exec(open("/tmp/off/offline/asm.py").read())
from chiar_megatron.operators.kernels import routed_attention_tiles as t
V={"forward":[(64,64,4,3,1,True),(64,64,4,2,1,True),(128,64,8,3,1,True)],
   "query_grad":[(64,64,4,2,1,True)],
   "key_grad":[(32,64,4,2,1,True)]}
D=os.path.dirname(PT)
for k,vs in V.items():
    for v in vs:
        t.OVERRIDES.clear(); t.OVERRIDES[k]=t.Tuning(*v)
        count.clear()
        print("##",k,v)
        import io,contextlib
        b=io.StringIO()
        with contextlib.redirect_stdout(b):
            try: mc.attention(128)
            except Exception as e: print("ERR",str(e)[:200])
        name={"forward":"_forward_kernel","query_grad":"_query_gradient_kernel","key_grad":"_key_gradient_kernel"}[k]
        print([l for l in b.getvalue().splitlines() if l.startswith(name) or "ERR" in l])
        base=f"{out}/{name}_1"
        print("   arrive",subprocess.run(f"{D}/nvdisasm -c {base}.cubin | grep -c WARPGROUP.ARRIVE",shell=True,capture_output=True,text=True).stdout.strip(),
              "C7515" in subprocess.run([PT,"-v","-arch=sm_90a",f"{base}.ptx","-o","/dev/null"],capture_output=True,text=True).stderr, flush=True)
