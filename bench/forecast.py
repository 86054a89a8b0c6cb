"""Forecasts beside what then happens: the guest is measured, the library says what a migration would come to, and then the
guest is really moved, or kept moving where it was said that it would never arrive."""
import os, random, statistics, time
from peers import MOVE_LIMIT, TICK, Failed, Vmig

MIB_128 = 32768                 # pages
PERIOD_MS = 2000                # measured for so long
POINTS, POINT_MIB = 20, 256     # drawn guests, and the memory they have
NEVER = 8                       # seconds a migration that is said never to end must go on
WRONG, SHORT_MS = 0.3, 5        # how far a forecast may be off, and what is too short to matter
PAGE = 4096
STEADY_LIMIT = 400_000_000      # bytes per second
START = 0.1                     # seconds that the library takes for granted before the first page arrives
SWITCHOVER = 1.5e9             # what loopback takes of few pages; the limit is lifted at the stop


class Foretold(Vmig):
    """One guest, measured, foretold and moved."""

    def words(self, side, line):
        """The answer to a command, as {name: text}; what follows `why` is one text."""
        verb = line.split()[0]
        side.say(line)
        text = self.answer(side, lambda said: said if said.startswith((verb, 'error')) else None, line)
        if text.startswith('error'):
            side.die(text)
        head, _, why = text.partition(' why ')
        return dict(word.split('=') for word in head.split() if '=' in word) | {'why': why}

    def must(self, side, line):
        side.say(line)
        if (said := self.answer(side, lambda said: said if said == 'ok' or said.startswith('error') else None, line)) != 'ok':
            side.die(said)

    def measured(self, source):
        for line in ('pause', 'resume', f'measure bitmap {PERIOD_MS}'):     # what a stop takes is known then
            self.must(source, line)
        while (rate := self.words(source, 'rate'))['state'] == '1':
            self.pass_time(0.05)
        if rate['state'] != '2':
            source.die(f"not measured: {rate['why']}")
        return rate

    def run(self, link, settings):
        """What was foretold with this bandwidth, and what came."""
        try:
            source, destination, uri = self.ready()
            for name, value in settings.items():
                self.set(source, name, value)
            rate, said = self.measured(source), self.words(source, f'forecast {int(link)}')
            begin = time.monotonic()
            self.start(source, uri)
            never = said['verdict'] == 'does-not'
            try:
                self.watch(NEVER if never else MOVE_LIMIT, lambda: self.completed(source), 'the migration did not complete')
            except Failed:
                if not never and self.has_become(source, 'failed'):
                    raise
                return {'rate': rate, 'said': said, 'came': None}
            total = time.monotonic() - begin
            self.watch(MOVE_LIMIT, lambda: destination.beats, 'the guest was not heard after the move')
            blackout = destination.beats[0] - source.beats[-1] - TICK
            parts = self.words(source, 'downtime')                          # the last of each name: what it really took
            sent = int(self.words(source, 'status')['sent'])
            last = destination.wire[0] - source.wire[-1]
            return {'rate': rate, 'said': said,
                    'came': {'total_ms': total * 1e3, 'blackout_ms': blackout * 1e3},
                    'link': (sent - last) / max(0.01, total - blackout - START), 'last': last / max(1e-4, int(parts['ram']) / 1e9)}
        finally:
            self.end()


def near(foretold, came):
    """Whether a time (ms) came as foretold."""
    less, more = sorted((foretold, came))
    return more - less <= SHORT_MS or more <= less * (1 + WRONG)


def judged(found):
    """What became of a forecast: right, unknown or wrong; and both times, (foretold, came) in milliseconds."""
    said, came = found['said'], found['came']
    times = {'total': (int(said['total']) / 1e6, came['total_ms']),
             'blackout': (int(said['blackout']) / 1e6, came['blackout_ms'])} if came else {}
    if said['verdict'] == 'unknown':
        return 'unknown', times
    if said['verdict'] == 'does-not' or not came:
        return ('right' if said['verdict'] == 'does-not' and not came else 'wrong'), {}
    return ('right' if all(near(*pair) for pair in times.values()) else 'wrong'), times


def told(name, found):
    verdict, times = judged(found)
    words = ', '.join(f'{what} {a:.0f} ms foretold, {b:.0f} came' for what, (a, b) in times.items())
    came = words or ('it went on' if not found['came'] else 'it arrived')
    rate = found['rate']
    return (f"{name}: measured {int(rate['rate']) / 1e6:.0f} MB/s over {int(rate['working-set']) / 1e6:.0f} MB; "
            f"{found['said']['verdict']}: {verdict}; {came}")


def points(seed):
    """Guests drawn: pages per millisecond, pages they go round in, bytes per second, milliseconds the guest may stand still."""
    draw = random.Random(seed)
    for _ in range(POINTS):
        burst, mib = draw.randint(1, 48), draw.choice([2, 4, 8, 16, 32, 64, 128])
        yield burst, mib * 256, draw.randint(60, 500) * 1_000_000, draw.choice([30, 100, 300])


def steady(bench, image, groups, note, record):
    """The workloads of the other rows, with a limit and as fast as it goes. `image` makes a guest."""
    def pair(burst, pages):
        return Foretold(bench.vmm, bench.bare, image(burst, pages, bench.mib), bench.mib, bench.folder)
    # How fast this host is, with fresh memory and at the switchover, nobody can know but by moves.
    tries = [pair(64, MIB_128).run(1e9, {}) for _ in range(3)]
    link, last = (statistics.median(found[what] for found in tries) for what in ('link', 'last'))
    note(f'forecast: this host takes {link / 1e6:.0f} MB/s, and {last / 1e6:.0f} MB/s at the switchover')
    for settings, words in ({'max-bandwidth': STEADY_LIMIT}, f'{STEADY_LIMIT / 1e6:.0f} MB/s sent'), ({}, 'no limit'):
        for guest in groups.values():
            found = pair(guest.burst, guest.hot_pages).run(link, settings | {'avail-switchover-bandwidth': int(last)})
            note(f'forecast, {told(f"{guest.words}, {words}", found)}')
            record('steady, limited' if settings else 'steady, no limit', judged(found))


def drawn(bench, image, note, record):
    """Points drawn by a seed."""
    seed = int(os.environ.get('SEED') or time.time())
    note(f'forecast: the points are drawn by SEED={seed}')
    for number, (burst, pages, limit, downtime) in enumerate(points(seed)):
        guest = Foretold(bench.vmm, bench.bare, image(burst, pages, POINT_MIB), POINT_MIB, bench.folder)
        found = guest.run(SWITCHOVER, {'max-bandwidth': limit, 'downtime-limit': downtime})
        name = (f'point {number}, {burst * PAGE / 1e3:.0f} MB/s over {pages * PAGE / 1e6:.0f} MB, {limit / 1e6:.0f} MB/s sent, '
                f'{downtime} ms')
        note(f'forecast, {told(name, found)}')
        record('drawn', judged(found))
