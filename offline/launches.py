"""Launches of a layer's compiled CUDA code, forward and backward, listed without a GPU.

    PYTHONPATH=. .venv/bin/python -W ignore offline/launches.py 256 R [learned]      (A, R or D)

Traces the layer on fake CPU tensors with our kernels switched on, then moves the graphs to a fake H200 and
lets inductor schedule them. Full code is left in /tmp/launches_*.py. Works with torch 2.13 for CPU.
"""
exec(open(__file__.replace("launches.py", "trace.py")).read())
mode,x,g=setup()
pn=[(n,p) for n,p in layer.named_parameters()]
from functorch.compile import aot_function
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.compile_fx import _recursive_joint_graph_passes
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._inductor.fx_passes.post_grad import post_grad_passes
import torch._inductor.config as icfg, torch._inductor.runtime.hints as hints
icfg.compile_threads=1
import torch._inductor.utils as iu
graphs=[]
def grab(which):
    def c(gm,inputs):
        graphs.append((which,gm,inputs)); return gm.forward
    return c
def part(joint,inputs,**k):
    _recursive_joint_graph_passes(joint)
    return min_cut_rematerialization_partition(joint,inputs,**k)
class M(torch.nn.Module):
    def __init__(s): super().__init__(); s.l=layer
    def forward(s,x): return s.l.body(x,ForwardContext())
import torch._dynamo as D
with mode:
    x=x.requires_grad_()
    def backend(gm,inputs):
        return aot_module_simplified(gm,inputs,fw_compiler=grab("fw"),bw_compiler=grab("bw"),partition_fn=part,decompositions=select_decomp_table())
    out=torch.compile(layer.body,backend=backend,dynamic=False)(x,ForwardContext())
    out.backward(g)
props=hints.DeviceProperties(type="cuda",index=0,multi_processor_count=132,cc=90,major=9,regs_per_multiprocessor=65536,max_threads_per_multi_processor=2048,max_threads_per_block=1024,warp_size=32)
hints.DeviceProperties.create=classmethod(lambda c,d: props)
import types
P=types.SimpleNamespace(name="H200",major=9,minor=0,multi_processor_count=132,total_memory=1<<37,regs_per_multiprocessor=65536,max_threads_per_multi_processor=2048,max_threads_per_block=1024,warp_size=32,shared_memory_per_block_optin=232448,gcnArchName="",L2_cache_size=50<<20)
torch.cuda.get_device_properties=lambda *a:P
torch.cuda.get_device_capability=lambda *a:(9,0)
torch.cuda.is_available=lambda:True
torch.cuda.current_device=lambda:0
torch.cuda.device_count=lambda:1
torch.cuda.current_stream=lambda *a: types.SimpleNamespace(cuda_stream=0,stream_id=0)
torch._C._cuda_getCurrentRawStream=lambda i:0
import torch.utils._triton as ut
ut.triton_hash_with_backend=lambda:"x"
import sys as _s
sys.path.insert(0,"/work/main")
from tests.unit.machine_code import Driver
from triton.runtime import driver as _d
_d.set_active(Driver())
ut.has_triton=lambda *a:True
iu.has_triton=lambda *a:True
import torch._inductor.scheduler as sch
sch.has_triton=lambda *a:True
from torch._dynamo.device_interface import CudaInterface, get_interface_for_device
CudaInterface.Worker.get_device_properties=staticmethod(lambda *a:P)
CudaInterface.raise_if_triton_unavailable=staticmethod(lambda *a,**k:None)
import re
from torch._library.simple_registry import singleton
import torch._ops
orig=torch._ops.OpOverload.__call__
def call(self,*a,**k):
    if self.namespace.startswith("chiar"):
        fn=singleton.find(self._schema.name).fake_impl.kernel.func
        tm=torch.utils._pytree.tree_map
        dev=lambda d: (lambda v: (setattr(v,'fake_device',torch.device(d)),v)[1] if hasattr(v,'fake_device') else v)
        cpu=lambda v: torch.empty_strided(v.shape,v.stride(),dtype=v.dtype,device='cpu') if hasattr(v,'fake_device') else v
        with m2: out=fn(*tm(cpu,a),**k)
        return tm(dev('cuda:0'),out)
    return orig(self,*a,**k)
def mv(n):
    def f(v):
        if isinstance(v,torch.Tensor) and hasattr(v,'fake_device'): v.fake_device=torch.device('cuda:0')
        return v
    torch.utils._pytree.tree_map(f,n.meta.get('val'))
for which,gm,inputs in graphs:
    m2=next(n.meta['val'].fake_mode for n in gm.graph.nodes if n.op=='placeholder' and hasattr(n.meta.get('val'),'fake_mode'))
    from torch._inductor import compile_fx
    with V.set_fake_mode(m2): compile_fx._recursive_post_grad_passes(gm,is_inference=False)
torch._ops.OpOverload.__call__=call
for which,gm,inputs in graphs:
    m2=next(n.meta['val'].fake_mode for n in gm.graph.nodes if n.op=='placeholder' and hasattr(n.meta.get('val'),'fake_mode'))
    from torch._inductor import compile_fx
    for n in gm.graph.nodes:
        if "device" in n.kwargs: n.kwargs={**n.kwargs,"device":torch.device("cuda:0")}
        n.args=torch.fx.node.map_aggregate(n.args,lambda a: torch.device("cuda:0") if isinstance(a,torch.device) else a)
    gm.recompile()
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        with m2:
            [mv(n) for n in gm.graph.nodes]
            ins=[n.meta['val'] for n in gm.graph.nodes if n.op=='placeholder']
        for name in list(vars(gm)):
            v=getattr(gm,name)
            if isinstance(v,torch.Tensor): print("const",name,v.shape,v.device)
        from torch.fx.passes.fake_tensor_prop import FakeTensorProp
        [mv(n) for n in gm.graph.nodes]
        from torch._inductor import compile_fx
        with V.set_fake_mode(m2):
            [mv(n) for n in gm.graph.nodes]
            gl=GraphLowering(gm,example_inputs=ins,is_backward=which=="bw")
            from torch._inductor.debug import DebugContext
            with V.set_graph_handler(gl), V.set_debug_handler(DebugContext()):
                gl.run(*ins)
                code=gl.codegen()
    text=code[0].value if hasattr(code[0],"value") else str(code[0])
    open(f"/tmp/launches_{kind}_{which}.py","w").write(text)
    calls=re.findall(r"^\s+(\S*\.run|extern_kernels\.\w+|torch\.ops\.\S+|\w+ = torch\.ops\.\S+)\(",text,re.M)
    body=text[text.index("def call("):] if "def call(" in text else text
    print("==",which)
    for line in body.splitlines():
        mm=re.search(r"((triton_\w+)\.run|extern_kernels\.(\w+)|torch\.ops\.(\S+?)\()",line)
        if mm: print("  ",line.strip()[:150])
