"""cuDNN attention alone in several layouts, quiet and after large products."""
import torch, sys
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
aten = torch.ops.aten
dev, bf = "cuda", torch.bfloat16
n, d = 16, 64
def bshd(b, s): return torch.randn(b, s, n, d, device=dev, dtype=bf).transpose(1, 2)
def bhsd(b, s): return torch.randn(b, n, s, d, device=dev, dtype=bf)
def fused(b, s): return torch.randn(b, s, n, 3, d, device=dev, dtype=bf)
def inputs(kind, b, s):
    q, k, v, g = (bshd(b, s) for _ in range(4))
    if kind == "A all bhsd": return tuple(bhsd(b, s) for _ in range(4))
    if kind == "B step: v within qkv": return q, k, fused(b, s)[:, :, :, 2].transpose(1, 2), g
    if kind == "C bshd": return q, k, v, g
    if kind == "D k,v bhsd": return q, bhsd(b, s), bhsd(b, s), g
    if kind == "E v bhsd": return q, k, bhsd(b, s), g
    if kind == "F all within qkv":
        f = fused(b, s); return (*(f[:, :, :, i].transpose(1, 2) for i in range(3)), g)
    if kind == "G q,k within, v bshd":
        f = fused(b, s); return f[:, :, :, 0].transpose(1, 2), f[:, :, :, 1].transpose(1, 2), v, g
    if kind == "H as 3,b,s": # q k v side by side [3, b, s, n, d]
        f = torch.randn(3, b, s, n, d, device=dev, dtype=bf); return (*(f[i].transpose(1, 2) for i in range(3)), g)
    if kind == "I q bhsd grad bshd": return bhsd(b, s), bhsd(b, s), bhsd(b, s), g
kinds = ["A all bhsd", "B step: v within qkv", "C bshd", "D k,v bhsd", "E v bhsd", "F all within qkv", "I q bhsd grad bshd"]
a = torch.randn(8192, 8192, device=dev, dtype=bf); w = torch.randn(8192, 8192, device=dev, dtype=bf)
def calls(x):
    q, k, v = (t.detach().requires_grad_() for t in x[:3]); g = x[3]
    def fwd():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    out = fwd()
    return fwd, lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True), out
def med(call, heavy, rounds):
    ev = []
    call(); torch.cuda.synchronize()
    for _ in range(rounds):
        for _ in range(heavy): a @ w
        s, e = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        s.record(); call(); e.record(); ev.append((s, e))
    torch.cuda.synchronize()
    return sorted(s.elapsed_time(e) for s, e in ev)[rounds // 2]
for s, b in ((8192, 4), (2048, 16), (256, 128)):
    for kind in kinds:
        x = inputs(kind, b, s)
        try:
            fwd, bwd, out = calls(x)
            dq, dk, dv = bwd()
            row = [f"{med(c, h, 25):.4f}" for c in (fwd, bwd) for h in (0, 3)]
            print(s, kind, "fwd quiet/after products, bwd quiet/after:", *row, "out", out.stride(), "dq", dq.stride(), "dv", dv.stride(), flush=True)
        except Exception as err: print(s, kind, str(err)[:200], flush=True)
        del x
t = med(lambda: a @ w, 0, 40); print("product", 2*8192**3/t/1e9, "TFLOP/s")
