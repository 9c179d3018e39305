import sys, torch, warnings, collections
warnings.filterwarnings("ignore")
from dataclasses import replace
from types import SimpleNamespace
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.bench.step_config import StepSettings, routed_config, twin_config
from chiar_megatron.model.build import build_model
from chiar_megatron.operators.context import ForwardContext
import chiar_megatron.runtime.paths as paths
from torch._subclasses.fake_tensor import FakeTensorMode, FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
world = single_process_world("cpu")
ROUTER=sys.argv[3] if len(sys.argv)>3 else "entropy"
T=int(sys.argv[1]); kind=sys.argv[2]; B=32768//T
s=StepSettings(preset="400m",seq_length=T,tokens_per_step=32768,micro_batch_size=B,steps=1,warmup=1,routed_warmup=1,sides=("twin","routed"),rhos=(.5,),routers=(ROUTER,),precision="bf16",compile="no",repeat_twin=False,check=False,check_compiled=False,data=None,vocab_size=None,overrides=(),profile=None,seed=1)
cfg=routed_config(s,ROUTER,.5,1)
cfg=replace(cfg, model=replace(cfg.model, schedule="D R A", meta_router=replace(cfg.model.meta_router,enabled=False)))
m=build_model(cfg,world); m.train()
layer=m.chiar_layers["DRA".index(kind)]
def setup():
    mode=FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        def fake(t): return torch.empty(t.shape,dtype=t.dtype,device="cpu",requires_grad=False)
        for mod in layer.modules():
            for n,p in list(mod._parameters.items()):
                if p is not None: mod._parameters[n]=torch.nn.Parameter(fake(p),requires_grad=p.requires_grad)
            for n,p in list(mod._buffers.items()):
                if p is not None: mod._buffers[n]=fake(p)
        import chiar_megatron.operators.rotary as R
        a=layer.self_attention.rotary if hasattr(layer,"self_attention") else None
        if a is not None: a._cos_SD,a._sin_SD=fake(a._cos_SD),fake(a._sin_SD)
        st=layer.statistics
        if st is not None: st.sums_F,st.most_light=fake(st.sums_F),fake(st.most_light)
        x=torch.empty(B,T,1024,dtype=torch.bfloat16,device="cpu")
        g=torch.empty(B,T,1024,dtype=torch.bfloat16,device="cpu")
    for k,v in list(sys.modules.items()):
        if k.startswith("chiar_megatron") and hasattr(v,"kernels_available"): v.kernels_available=lambda d: True
    return mode,x,g
