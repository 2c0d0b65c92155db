"""Forward and backward of the attention over whole sequences against dense causal attention.

python scripts/studies/bench_attention.py --lengths 640 4096 --threads 1
"""

from tqdm.auto import tqdm

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import SPARSE_LENGTH, race, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import ATTENTIONS, DENSE, OURS, attention_work, windowed

LENGTHS = (640, 1024, 2048, 4096, 16384)


def measure(args: BenchArgs) -> list[dict]:
    rows, work = [], "forward+backward"
    for length in tqdm(args.lengths or LENGTHS, desc="attention"):
        functions = ATTENTIONS | ({f"{OURS}, 8k window": windowed} if length >= SPARSE_LENGTH else {})
        contenders = {name: attention_work(call, length, work, **args.inputs) for name, call in functions.items()}
        # a round of many seconds needs no warm-up
        times = race(contenders, repeats=args.repeats, seconds=args.seconds if length < 16384 else 5)
        rows += summarize_race(times, [DENSE], work=work, length=length)
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("attention", measure, grows=True))
