"""First sitting: the VAE and the recogniser, side by side on one GPU."""
import argparse, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from spark2.model import parts as build
from spark2.recogniser import Recogniser
from spark_training.clock import Budget, Log
SIZES = ((128, 128), (160, 96), (96, 160), (144, 112), (112, 144))
def main():
    p = argparse.ArgumentParser(); p.add_argument("what"); p.add_argument("--out", type=Path, required=True); p.add_argument("--minutes", type=float); p.add_argument("--steps", type=int); a = p.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0); torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.allow_tf32 = True
    from spark_training.data2 import compile_drawing
    if device == 'cuda': compile_drawing(); torch.backends.cudnn.benchmark = True
    a.out.mkdir(parents=True, exist_ok=True)
    log = Log(a.out / f"{a.what}.jsonl"); budget = Budget(a.steps, "steps") if a.steps else Budget(a.minutes, "minutes")
    if a.what == "vae":
        from spark_training.vae2 import train_vae
        vae = build()["vae"]; train_vae(vae, budget, log, device, SIZES)
        save_file({k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}, a.out / "vae.safetensors", metadata={"scale": str(vae.config.scaling_factor), "shift": str(vae.config.shift_factor)})
    else:
        from spark_training.recogniser2 import train_recogniser
        torch.manual_seed(0); net = Recogniser(); print(sum(p.numel() for p in net.parameters())/1e6)
        train_recogniser(net, budget, log, device, SIZES)
        save_file({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}, a.out / "recogniser.safetensors")
main()
