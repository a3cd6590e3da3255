"""One sitting of the flow's training.

state.safetensors (averages, fp16) in --start; writes the same to --out.
"""
import argparse, json, math, time, copy, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from spark2.model import parts as build
from spark2.scenes import Dice
from spark_training.average import Average, Masters, parameters, copy as put
from spark_training.clock import Budget, Clock, Log
from spark_training.data2 import Encoder, compile_drawing
from spark_training.flow2 import TRAINED, Flow, train_flow
T0=time.time()
def load_vae(parts, path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f: meta=f.metadata()
    parts["vae"].load_state_dict(load_file(path)); parts["vae"].register_to_config(scaling_factor=float(meta["scale"]), shift_factor=float(meta["shift"]))
def main():
    p=argparse.ArgumentParser(); p.add_argument("--vae",type=Path); p.add_argument("--start",type=Path); p.add_argument("--out",type=Path,required=True)
    p.add_argument("--seconds",type=float); p.add_argument("--steps",type=int); p.add_argument("--pool",type=int,default=300000); p.add_argument("--batch",type=int,default=512); p.add_argument("--peak",type=float,default=1.5e-3); p.add_argument("--last",action="store_true"); p.add_argument("--distil",action="store_true"); p.add_argument("--sizes",type=int,default=1); p.add_argument("--no-compile",action="store_true"); p.add_argument("--until",type=float,help="seconds of this process at which to stop")
    a=p.parse_args(); a.out.mkdir(parents=True,exist_ok=True)
    device="cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(int(time.time())); torch.backends.cuda.matmul.allow_tf32=True; torch.backends.cudnn.allow_tf32=True
    log=Log(a.out/"flow.jsonl"); parts=build(); load_vae(parts,a.vae); parts["vae"].to(device)
    trained={n:parts[n].to(device) for n in TRAINED}; ws=parameters(trained.values()); names=[f"{n}.{k}" for n in TRAINED for k,_ in parts[n].named_parameters()]
    before={"seconds":0.0,"steps":0}
    if a.start:
        state=load_file(a.start); from safetensors import safe_open
        with safe_open(a.start,"pt") as f: before=json.loads(f.metadata()["clock"])
        put([state[n].to(device).float() for n in names],ws)
    seed=before["steps"]
    if device=="cuda" and not a.no_compile: compile_drawing()
    encoder=Encoder(parts,device); t=time.time(); SIZES=((128,128),(160,96),(96,160),(144,112),(112,144))
    usual=[]
    from spark_training.data2 import Pool
    chunk=50000
    for i in range(-(-a.pool//chunk)): usual.append(encoder.edits(min(chunk,a.pool),SIZES[0],Dice("pool",seed,i)))
    def join(ps): return Pool(ps[0].grid,*(torch.cat([getattr(q,c) for q in ps]) for c in ("source","target","t5","clip")))
    pools=[(join(usual),26 if a.sizes>1 else 34)]
    pools+=[(encoder.edits(a.pool//8,s,Dice("pool",seed,*s)),2) for s in SIZES[1:a.sizes]]
    pools+=[(encoder.captioned(a.pool//6,SIZES[0],Dice("captions",seed)),6)]
    log.write(part="pool",edits=float(sum(len(q) for q,_ in pools)),seconds=time.time()-t,since=time.time()-T0)
    flow=Flow(parts,encoder,device); masters=Masters(ws)
    if a.start: masters.values[:]=[state[n].to(device).float() for n in names]
    average=Average(masters.values,decay=0.9995,start=[m.clone() for m in masters.values] if a.start else None)
    if a.distil: flow.learn_from([copy.deepcopy(m).eval().requires_grad_(False) for m in flow.modules])
    if device=="cuda" and not a.no_compile: flow.compile()
    began=before["seconds"]; seconds=(a.until-(time.time()-T0)) if a.until else a.seconds
    clock=Clock(Budget(a.steps,"steps") if a.steps else Budget((began+seconds)/60,"minutes"),**before)
    start_spent=clock.spent
    def fall(spent,step):
        here=(spent-start_spent)/(1-start_spent)   # share of this sitting
        tail=max(0.0,1-max(0.0,here-0.0)) if a.last else 1.0-0.75*max(0.0,(here-0.75)/0.25)
        return min(1.0,(step+1)/200)*max(0.02,tail)
    def save():
        v=average.values
        if not all(bool(x.isfinite().all()) for x in v): raise FloatingPointError("diverged")
        tmp=a.out/"part.safetensors"
        save_file({n:x.half().cpu().contiguous() for n,x in zip(names,v)},tmp,metadata={"clock":json.dumps({"seconds":clock.seconds,"steps":clock.steps})}); tmp.replace(a.out/"state.safetensors")
    train_flow(flow,pools,clock,log,device,masters=masters,average=average,batch=a.batch,on_minute=save,peak=a.peak,fall=fall)
    log.write(part="done",steps=clock.steps,seconds=clock.seconds,since=time.time()-T0,memory=torch.cuda.max_memory_allocated()/2**30 if device=="cuda" else 0.)
main()
