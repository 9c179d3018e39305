from chiar_megatron.operators.kernels import spectral as S
import torch as t
S._multiprocessors=lambda d:132
S._products=lambda p,c: "tf32" if p!="ieee" else "ieee"
for h in (96,768,1000,2048,4096):
    x=t.empty(4096,h,dtype=t.bfloat16); w=t.empty(h)
    rows,cnt=t.zeros(4096,dtype=t.int32),t.zeros(1,dtype=t.int32)
    dx=t.empty(4096,h,dtype=t.bfloat16)
    print(h)
    S.spectral_entropy(x); S.mix(x,w,rows,cnt); S.mix_backward(dx,x,w,(rows,cnt),dx); S.mix_backward(dx,x,w,(None,None),dx); S._both_op(x,w,1.0,"bf16",None)
x=t.empty(4096,1024); S.mix_backward(x,x,w[:1024],(None,None),x.clone(),"tf32"); S.spectral_entropy(x,1.0,"ieee")
