import time, os, torch, shutil
from tests.distributed.small_run import *
from tests.distributed.launch import run_ranks
from dsv3_megatron.checkpoint.store import *

def go(changes, load, save, extra=0):
    t0=time.time()
    tr = start(small_run(**changes))
    t1=time.time()
    out = {}
    if load:
        p = load_checkpoint(load, tr.run, tr.chunks, tr.optimizer, tr.groups)
        out["progress"]=p
        step = p.iteration
    else:
        for i in range(2): print(tr.step(i))
        step = 2
    t2=time.time()
    out["state"]=tr.whole_state()
    if save:
        save_checkpoint(save, Progress(step, 8, 128), tr.run, tr.chunks, tr.optimizer, tr.groups, keep_last=2)
    t3=time.time()
    out["loss"]=tr.step(step)
    out["t"]=(t1-t0,t2-t1,t3-t2,time.time()-t3)
    out["n"]=sum(p.numel() for c in tr.chunks for p in c.parameters())
    return out
if __name__=="__main__":
    for d in "abcdefgh": shutil.rmtree("/tmp/ck/"+d, ignore_errors=True)
    L = dict(one={}, pp2ep2=dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2), ep4=dict(expert_model_parallel_size=4),
      tp2=dict(tensor_model_parallel_size=2), dp2={}, vpp=dict(pipeline_model_parallel_size=2,num_virtual_stages_per_pipeline_rank=2), tp2ep2=dict(tensor_model_parallel_size=2,expert_model_parallel_size=2), etp2=dict(expert_tensor_parallel_size=2,tensor_model_parallel_size=2,expert_model_parallel_size=2))
    ref=None
    import sys
    chain = [("pp2ep2",4),("ep4",4),("one",1),("tp2",2),("dp2",2),("vpp",2),("tp2ep2",4),("etp2",4),("pp2ep2",4)]
    prev=None
    for (name,n),d in zip(chain,"abcdefghi"):
        t=time.time()
        r = run_ranks(n, go, L[name], prev, "/tmp/ck/"+d)
        prev="/tmp/ck/"+d
        m = merge([x["state"] for x in r])
        if ref is None: ref=m
        print(name, n, [x["loss"] for x in r][:1], len(m), differences(ref,m)[:5], r[0]["t"], time.time()-t, r[0]["n"], flush=True)
