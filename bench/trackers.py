"""What each dirty tracker costs, as `cargo bench --bench trackers` finds it: rows of its samples."""
import collections, glob, json, os, subprocess
from peers import Failed, child

MOST_S = 1800                           # building it included
# Group of the benchmark -> words of the row, unit, nanoseconds in one of these, the function that is the floor.
GROUPS = {
    'dirty a page': ('first write to a page', 'ns', 1, {'': 'untracked', 'kvm': 'a KVM guest, untracked'}),
    'sync a page written': ('sync of pages written, each', 'ns', 1, {}),
    'sync a GiB, nothing written': ('sync of a GiB, nothing written', 'us', 1e3, {}),
    'sync a GiB, one page in 8 written': ('sync of a GiB, one page in 8 written', 'us', 1e3, {}),
    'protect a GiB': ('protecting a GiB', 'us', 1e3, {}),
}
Cost = collections.namedtuple('Cost', 'group name each')


def measure(folder):
    """Every function of the benchmark, with nanoseconds for each of its elements, sample by sample."""
    home = os.path.join(folder, 'criterion')
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    argv = [os.environ.get('CARGO', 'cargo'), 'bench', '--locked', '--bench', 'trackers']
    done = subprocess.run(argv, cwd=root, env=os.environ | {'CRITERION_HOME': home}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=MOST_S, preexec_fn=child())
    if done.returncode:
        raise Failed(f'{" ".join(argv)}: status {done.returncode}: {done.stdout[-500:]}')
    return [cost(path) for path in sorted(glob.glob(f'{home}/*/*/new'))]


def cost(path):
    with open(f'{path}/benchmark.json') as what, open(f'{path}/sample.json') as sample:
        what, sample = json.load(what), json.load(sample)
    elements = (what['throughput'] or {}).get('Elements', 1)
    each = [took / rounds / elements for rounds, took in zip(sample['iters'], sample['times'])]
    return Cost(what['group_id'], what['function_id'], each)


def rows(costs, row):
    """Rows made by `row`; what a write costs without a tracker stands in the column of limits."""
    found = {(cost.group, cost.name): cost.each for cost in costs}
    for group, (words, unit, scale, floors) in GROUPS.items():
        scaled = lambda name, group=group, scale=scale: [each / scale for each in found.get((group, name), [])]
        for name in [name for its, name in found if its == group and name not in floors.values()]:
            floor = scaled(floors['kvm' if name.startswith('kvm') else '']) if floors else []
            yield row(f'tracker {name}: {words}', unit, 'lower', scaled(name), [], floor, None)
