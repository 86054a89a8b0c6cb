"""One move of the benchmark's guest, by two vmig VMMs or by two QEMUs, watched from outside in the same way.

The guest says one byte per tick on port 0xe9; both VMMs pass it on at once, and it is stamped here, on arrival. What is
measured begins when the command to migrate is given and ends when the source says it completed and the destination's
guest has been heard.
"""
import ctypes, fcntl, json, os, select, selectors, signal, socket, subprocess, threading, time
from wire import Connections, Loopback, worst_excess

START_LIMIT = 60                # seconds until the guest filled its memory and beats
MOVE_LIMIT = 60
CONVERGE_LIMIT = 120            # seconds for a guest that has to be slowed down
HOPELESS_S = 30                 # seconds one is watched that is not
STEADY = 0.3                    # seconds it runs before it moves
HOLD_MORE = 128                 # MiB held ready beyond the guest's size
TICK = 0.001                    # seconds between two beats of a guest that does not stall
GUEST_CORE, OTHER_CORE = 0, 1   # of pinned runs
SAMPLE = 0.01                   # seconds between two looks at the wire of throttled runs
PR_SET_PDEATHSIG = 1
QEMU_MACHINE = ('microvm,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off,acpi=off,auto-kernel-cmdline=off,'
                'memory-backend=ram')
libc = ctypes.CDLL(None)


class Failed(Exception):
    pass


def child(cores=None):
    """What a child does before its program: it ends with us, whatever ends us, and runs where it should."""
    def prepare():
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if cores:
            os.sched_setaffinity(0, cores)
    return prepare


def tsc_khz():
    """Frequency of a guest's time stamp counter, as KVM says."""
    create_vm, create_vcpu, get_tsc_khz = 0xae01, 0xae41, 0xaea3
    fds = []
    try:
        fds.append(os.open('/dev/kvm', os.O_RDWR | os.O_CLOEXEC))
        fds.append(fcntl.ioctl(fds[0], create_vm, 0))
        fds.append(fcntl.ioctl(fds[1], create_vcpu, 0))
        return fcntl.ioctl(fds[2], get_tsc_khz, 0)
    finally:
        for fd in reversed(fds):
            os.close(fd)


class Age:
    """A virtual machine may give free memory back to its host, some seconds after it became free; who needs it then waits
    for the host. So nobody begins before what the one before left behind has this age: memory is equally fresh for all."""
    SECONDS = 2.5
    began = 0

    @classmethod
    def begin(cls):
        cls.began = time.monotonic()

    @classmethod
    def missing(cls):
        return max(0, cls.began + cls.SECONDS - time.monotonic())


class Held:
    """The opposite: memory the kernel has at hand, populated by a process that lets go of it just before the move."""

    def __init__(self, bare, mib):
        self.process = subprocess.Popen([bare, 'hold', str(mib + HOLD_MORE)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, preexec_fn=child())
        os.set_blocking(self.process.stdout.fileno(), False)

    def ready(self):
        if self.process.poll() is not None:
            raise Failed('bare hold: no memory')
        return self.process.stdout.read() is not None

    def release(self):
        self.process.stdin.close()
        self.process.wait(START_LIMIT)

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Side:
    """A process with a guest: its heartbeats, its lines, its CPU time."""

    def __init__(self, name, argv, pass_fds, beat, talk_in, talk_out, log, **more):
        self.name, self.beat, self.talk_in, self.talk_out, self.log = name, beat, talk_in, talk_out, log
        self.beats, self.lines, self.partial = [], [], b''
        self.wire = []          # bytes that had crossed the wire at each beat
        self.process = subprocess.Popen(argv, pass_fds=pass_fds, stderr=open(log, 'wb'), **more)

    def say(self, line):
        os.write(self.talk_in, line.encode() + b'\n')

    def hear(self, data):
        *whole, self.partial = (self.partial + data).split(b'\n')
        self.lines += [line.decode() for line in whole]

    def guest_threads(self):
        base = f'/proc/{self.process.pid}/task'
        for task in os.listdir(base):
            try:
                with open(f'{base}/{task}/comm') as f:
                    if f.read().startswith(('vcpu ', 'CPU ')):
                        yield int(task)
            except FileNotFoundError:
                pass            # a thread that just ended

    def cpu_seconds(self):
        """Of the whole process, threads that ended included, but for the guest's own: it spins between two ticks."""
        total = time.clock_gettime(~self.process.pid << 3 | 2)      # the clock of another process's CPU time
        for task in self.guest_threads():
            with open(f'/proc/{self.process.pid}/task/{task}/schedstat') as f:
                total -= int(f.read().split()[0]) / 1e9
        return total

    def die(self, what):
        with open(self.log, errors='replace') as f:
            said = f.read().strip()[-500:]
        raise Failed(f'{self.name}: {what}' + (f' ({said})' if said else ''))

    def end(self):
        self.process.kill()
        self.process.wait()
        for fd in {self.beat, self.talk_in, self.talk_out}:
            os.close(fd)


class Pair:
    """Source and destination. Subclasses say how to launch, command and understand them.

    channels: None the program's own default, 0 the plain stream, else so many parallel connections. held: fresh memory
    is at hand, else it has the age it has for all."""

    def __init__(self, program, bare, image, mib, folder, channels=None, pinned=False, held=False, checksum=False,
                 ring=False):
        self.program, self.bare, self.image, self.mib, self.folder = program, bare, image, mib, folder
        self.channels, self.pinned, self.held, self.checksum, self.sides = channels, pinned, held, checksum, []
        self.selector, self.loopback = selectors.DefaultSelector(), Loopback()
        self.cores = {OTHER_CORE} if pinned else None
        self.ring = ring                # vmig finds dirty pages by KVM's dirty rings

    def launch(self, name, incoming):
        side = self.make(name, incoming)
        self.sides.append(side)
        self.selector.register(side.beat, selectors.EVENT_READ, (side, True))
        self.selector.register(side.talk_out, selectors.EVENT_READ, (side, False))
        return side

    def watch(self, limit, until, what, sample=None):
        """Listens to both sides until the condition holds."""
        end = time.monotonic() + limit
        next_sample = time.monotonic()
        while not until():
            now = time.monotonic()
            if now >= end:
                raise Failed(f'{self.kind}: {what}: not within {limit} seconds')
            if sample and now >= next_sample:
                sample()
                next_sample = max(next_sample + SAMPLE, now)
            for key, _ in self.selector.select(min(end, next_sample if sample else end) - now):
                self.on_data(*key.data, os.read(key.fd, 65536), what)

    def on_data(self, side, is_beat, data, what):
        now = time.monotonic()
        if not data:
            side.process.wait()
            side.die(f'ended with status {side.process.returncode}: {what}')
        if not is_beat:
            side.hear(data)
        elif self.is_beat(data):
            side.beats.append(now)
            side.wire.append(self.loopback.read())

    def answer(self, side, is_answer, what):
        """The first line the condition accepts; the lines before it are dropped."""
        def found():
            while side.lines:
                line = side.lines.pop(0)
                if (answer := is_answer(line)) is not None:
                    answers.append(answer)
                    return True
            return False
        answers = []
        self.watch(START_LIMIT, found, what)
        return answers[0]

    def pass_time(self, seconds, sample=None):
        end = time.monotonic() + seconds
        self.watch(seconds + 1, lambda: time.monotonic() >= end, 'waiting', sample)

    def is_beat(self, data):
        return True

    def ready(self):
        """Both sides up, the guest running."""
        destination = self.launch('destination', True)
        uri = self.listen(destination)
        source = self.launch('source', False)
        self.prepare(source)
        held = Held(self.bare, self.mib) if self.held else None
        try:
            self.watch(START_LIMIT, lambda: source.beats, 'the guest did not say that it is ready')
            if self.pinned:
                for side in self.sides:
                    for task in self.vcpus(side):
                        os.sched_setaffinity(task, {GUEST_CORE})
            if held:
                self.watch(START_LIMIT, held.ready, 'memory to hold ready', sample=lambda: None)
            self.pass_time(STEADY if held else max(STEADY, Age.missing()))
            if held:
                held.release()
        finally:
            if held:
                held.end()
        return source, destination, uri

    def vcpus(self, side):
        return list(side.guest_threads())

    def end(self):
        for side in self.sides:
            side.end()
        Age.begin()
        self.selector.close()
        self.loopback.close()
        if self.pinned:
            os.sched_setaffinity(0, set(range(os.cpu_count())))

    def converged(self, mb_per_s, options):
        """Moves a guest that dirties more than the link takes; what it took, and how much slower the guest was meanwhile."""
        try:
            source, destination, uri = self.ready()
            self.set_rate(source, mb_per_s * 1e6)
            self.slow_down(source, options)
            begin = time.monotonic()
            self.start(source, uri)
            self.watch(CONVERGE_LIMIT, lambda: self.completed(source), 'the migration did not complete')
            done = time.monotonic()
            self.watch(MOVE_LIMIT, lambda: destination.beats, 'the guest was not heard after the move')
            ran = source.beats[-1] - begin
            beats = sum(beat >= begin for beat in source.beats)
            return {'total_ms': (done - begin) * 1e3, 'blackout_ms': (destination.beats[0] - source.beats[-1]) * 1e3,
                    'slowed': max(0, 100 - 100 * beats * TICK / ran)}
        finally:
            self.end()

    def hopeless(self, mb_per_s):
        """The same guest with nobody who helps: whether it arrives while it is watched."""
        try:
            source, _, uri = self.ready()
            self.set_rate(source, mb_per_s * 1e6)
            self.start(source, uri)
            end = time.monotonic() + HOPELESS_S
            self.watch(HOPELESS_S + 1, lambda: time.monotonic() >= end or self.completed(source), 'watching')
            return {'completed': float(time.monotonic() < end)}
        finally:
            self.end()

    def move(self):
        """Moves the guest once; what it took."""
        try:
            if self.pinned:
                os.sched_setaffinity(0, {GUEST_CORE})
            source, destination, uri = self.ready()
            cpu = [side.cpu_seconds() for side in self.sides]
            begin = time.monotonic()
            self.start(source, uri)
            self.watch(MOVE_LIMIT, lambda: self.completed(source), 'the migration did not complete')
            done = time.monotonic()
            self.watch(MOVE_LIMIT, lambda: destination.beats, 'the guest was not heard after the move')
            cpu = sum(side.cpu_seconds() - before for side, before in zip(self.sides, cpu))
            during = [t for t in source.beats if t >= begin - 0.01]
            return {
                'total_ms': (done - begin) * 1e3,
                'gb_per_s': self.mib * 2**20 / (done - begin) / 1e9,
                'blackout_ms': (destination.beats[0] - source.beats[-1]) * 1e3,
                'stall_ms': max((b - a - TICK for a, b in zip(during, during[1:])), default=0) * 1e3,
                'cpu_s_per_gib': cpu * 1024 / self.mib,
                'last_mb': (destination.wire[0] - source.wire[-1]) / 1e6,
            }
        finally:
            self.end()

    def cancelled(self, phase):
        """Starts a migration, cancels it in a phase, and says how long that took."""
        silent = socket.create_server(('127.0.0.1', 0))
        try:
            source, _, uri = self.ready()
            if phase == 'pre-switchover':
                self.pause_before_switchover(source)
            else:
                self.set_rate(source, 100e6)
            if phase == 'silent':
                uri = f'tcp:127.0.0.1:{silent.getsockname()[1]}'
            self.start(source, uri)
            if phase == 'pre-switchover':
                self.watch(MOVE_LIMIT, lambda: self.has_become(source, 'pre-switchover'), 'the guest was not stopped')
            else:
                self.pass_time(STEADY)
            begin = time.monotonic()
            self.cancel(source)
            self.watch(MOVE_LIMIT, lambda: self.has_become(source, 'cancelled'), 'the migration was not cancelled')
            took = time.monotonic() - begin
            beats = len(source.beats)
            self.watch(MOVE_LIMIT, lambda: len(source.beats) > beats, 'the guest was not heard after the cancel')
            return {'cancel_ms': took * 1e3}
        finally:
            silent.close()
            self.end()

    def throttled(self):
        """Sends under a rate limit that is raised and lowered meanwhile; how far it went beyond, and what it reached."""
        rate, connections = 200e6 * self.mib / 1024, Connections()
        samples = []
        sample = lambda: samples.append(connections.read())
        try:
            source, _, uri = self.ready()
            self.set_rate(source, rate)
            sample()
            rates = [(time.monotonic(), rate)]
            self.start(source, uri)
            self.pass_time(2, sample)
            steady = [(after, sent) for _, after, sent in samples if after > rates[0][0] + 0.5]
            # A raised rate counts from the command on, a lowered one from its answer on.
            rates.append((time.monotonic(), 2 * rate))
            self.set_rate(source, 2 * rate)
            self.pass_time(1, sample)
            self.set_rate(source, rate / 2)
            rates.append((time.monotonic(), rate / 2))
            self.pass_time(1, sample)
            if self.completed(source):
                raise Failed(f'{self.kind}: the migration was over before the rate limit was measured')
            (begin, first), (end, last) = steady[0], steady[-1]
            return {'excess_bytes': worst_excess(samples, rates), 'steady_mb': (last - first) / (end - begin) / 1e6}
        finally:
            connections.close()
            self.end()


class Vmig(Pair):
    kind = 'vmig'

    def guest(self, incoming):
        return ['--firmware', self.image] + (['--ring', '4096'] if self.ring else [])

    def address(self):
        return 'tcp:127.0.0.1:0'

    def make(self, name, incoming):
        beats, beats_in = os.pipe()
        commands_out, commands = os.pipe()
        lines, lines_in = os.pipe()
        argv = [self.program, '--mem', str(self.mib), *self.guest(incoming), '--events-fd', str(beats_in)]
        if incoming:
            argv += ['--incoming', self.address()]
        side = Side(f'vmig {name}', argv, [beats_in], beats, commands, lines, f'{self.folder}/vmig-{name}.log',
                    stdin=commands_out, stdout=lines_in, preexec_fn=child(self.cores))
        for fd in (beats_in, commands_out, lines_in):
            os.close(fd)
        return side

    def is_beat(self, data):
        return b'beat' in data          # the same pipe tells of stops and starts

    def listen(self, destination):
        said = lambda line: line.split()[1] if line.startswith('listening ') else None
        return self.answer(destination, said, 'waiting for its address')

    def set(self, side, option, value):
        def reply(line):
            if line.startswith('error'):
                side.die(line)
            return line if line == 'ok' else None
        side.say(f'set {option} {value}')
        self.answer(side, reply, f'set {option}')

    def prepare(self, source):
        if self.checksum:
            self.set(source, 'checksum', 'crc32c')
        if self.channels is None:
            return
        self.set(source, 'multifd', 'on' if self.channels else 'off')
        if self.channels:
            self.set(source, 'multifd-channels', self.channels)

    def set_rate(self, source, rate):
        self.set(source, 'max-bandwidth', int(rate))

    def slow_down(self, source, options):
        for name, value in options.items():
            self.set(source, name, value)

    def start(self, source, uri):
        source.say(f'migrate {uri}')

    def pause_before_switchover(self, source):
        self.set(source, 'pause-before-switchover', 'on')

    def cancel(self, source):
        source.say('cancel')

    def has_become(self, source, state):
        return f'event {state}' in source.lines

    def completed(self, source):
        for line in source.lines:
            if line.startswith(('event failed', 'error')):
                source.die(line)
        return 'event completed' in source.lines

    def words(self):
        """What the words of a move cost: the hello, through a relay that looks at the clock, and READY, GO and OWNED."""
        try:
            source, destination, uri = self.ready()
            relay = Relay(uri)
            self.set(source, 'multifd', 'off')      # the relay takes one connection
            self.start(source, relay.uri)
            self.watch(MOVE_LIMIT, lambda: self.completed(source), 'the migration did not complete')
            self.watch(MOVE_LIMIT, lambda: destination.beats, 'the guest was not heard after the move')
            return {'hello_ms': relay.took() * 1e3}
        finally:
            self.end()


class Relay(threading.Thread):
    """Passes one connection on, and looks when the destination's first bytes come: its answer to the hello."""

    def __init__(self, uri):
        super().__init__(daemon=True)
        host, port = uri.removeprefix('tcp:').rsplit(':', 1)
        self.there, self.server = (host, int(port)), socket.create_server(('127.0.0.1', 0))
        self.uri, self.began, self.answered = f'tcp:127.0.0.1:{self.server.getsockname()[1]}', None, None
        self.start()

    def run(self):
        source, _ = self.server.accept()
        self.began = time.monotonic()
        self.server.close()
        there = socket.create_connection(self.there)
        for s in (source, there):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        other = {source: there, there: source}
        try:
            while True:
                for s in select.select([source, there], [], [])[0]:
                    if s is there and self.answered is None:
                        self.answered = time.monotonic()
                    if not (data := s.recv(1 << 20)):
                        return
                    other[s].sendall(data)
        except OSError:
            pass
        finally:
            source.close(), there.close()

    def took(self):
        if self.answered is None:
            raise Failed('vmig: the destination did not answer the hello')
        return self.answered - self.began


class Words:
    """Two processes with next to nothing to move: what is left of a switchover is what its words cost."""

    def __init__(self, program):
        self.program = program

    def say(self, side, line, start):
        side.stdin.write(line + '\n')
        side.stdin.flush()
        while (said := side.stdout.readline()) and not said.startswith(start):
            if said.startswith('error'):
                raise Failed(f'switchover: {line}: {said.strip()}')
        return said.split()

    def run(self):
        sides = [subprocess.Popen([self.program, fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  preexec_fn=child()) for fill in ('33', '0')]
        try:
            source, destination = sides
            self.say(source, 'start', 'ok')
            uri = self.say(destination, 'in tcp:127.0.0.1:0', 'listening')[1]
            self.say(source, f'out {uri}', 'ok')
            end = time.monotonic() + MOVE_LIMIT
            while 'state=completed' not in self.say(source, 'status', 'status'):
                if time.monotonic() > end:
                    raise Failed('switchover: the migration did not complete')
                time.sleep(0.01)
            parts = dict(word.split('=') for word in self.say(source, 'parts', 'parts')[1:])
            ready, owned = (int(parts[name]) / 1e6 for name in ('load', 'go'))
            return {'ready_ms': ready, 'owned_ms': owned, 'words_ms': ready + owned}
        finally:
            for side in sides:
                side.kill()
                side.wait()


class HandOver(Vmig):
    """One guest that goes from process to process on this host without its memory being copied."""
    SETTINGS = ['--memfd', '--set', 'hand-over on', '--vcpus', '1']

    def guest(self, incoming):
        return self.SETTINGS + ([] if incoming else ['--fill', 'pattern', '--pages', '256', '--burst', '1'])

    def address(self):
        return f'unix:{self.folder}/hand-over-{len(self.sides)}'

    def moves(self, rounds, each):
        try:
            source = self.launch('source', False)
            self.watch(START_LIMIT * 2, lambda: source.beats, 'the guest did not say that it is ready')
            for number in range(rounds):
                destination = self.launch(f'destination-{number}', True)
                uri = self.listen(destination)
                self.pass_time(STEADY)
                source.lines.clear()    # it completed before, as a destination
                begin = time.monotonic()
                self.start(source, uri)
                self.watch(MOVE_LIMIT, lambda: self.completed(source), 'the hand-over did not complete')
                done = time.monotonic()
                self.watch(MOVE_LIMIT, lambda: destination.beats, 'the guest was not heard after the hand-over')
                each({'total_ms': (done - begin) * 1e3,
                      'blackout_ms': (destination.beats[0] - source.beats[-1]) * 1e3})
                self.pass_time(STEADY)  # the guest checks its pages; a wrong one ends its process
                for fd in (source.beat, source.talk_out):
                    self.selector.unregister(fd)
                self.sides.remove(source)
                source.end()
                source = destination
        finally:
            self.end()


class Qemu(Pair):
    kind = 'QEMU'

    def make(self, name, incoming):
        beats, beats_in = socket.socketpair()
        control, control_in = socket.socketpair()
        argv = [self.program, '-M', QEMU_MACHINE, '-accel', 'kvm', '-cpu', 'qemu64', '-m', f'{self.mib}M',
                '-object', f'memory-backend-ram,id=ram,size={self.mib}M', '-bios', self.image,
                '-nodefaults', '-no-user-config', '-display', 'none', '-name', 'bench,debug-threads=on',
                '-chardev', f'socket,id=beats,fd={beats_in.fileno()}',
                '-device', 'isa-debugcon,iobase=0xe9,chardev=beats',
                '-chardev', f'socket,id=control,fd={control_in.fileno()}', '-mon', 'chardev=control,mode=control']
        if incoming:
            argv += ['-incoming', 'defer']
        fd = control.detach()
        side = Side(f'QEMU {name}', argv, [beats_in.fileno(), control_in.fileno()], beats.detach(), fd, fd,
                    f'{self.folder}/qemu-{name}.log', stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    preexec_fn=child(self.cores))
        beats_in.close(), control_in.close()
        return side

    def qmp(self, side, command, **arguments):
        def reply(line):
            message = json.loads(line)
            if 'error' in message:
                side.die(f"{command}: {message['error']['desc']}")
            return message.get('return')
        side.say(json.dumps({'execute': command, 'arguments': arguments}))
        return self.answer(side, reply, command)

    def launch(self, name, incoming):
        side = super().launch(name, incoming)
        self.qmp(side, 'qmp_capabilities')
        capabilities = ['events'] + (['multifd'] if self.channels else [])
        self.qmp(side, 'migrate-set-capabilities', capabilities=[{'capability': c, 'state': True} for c in capabilities])
        if self.channels:
            self.qmp(side, 'migrate-set-parameters', **{'multifd-channels': self.channels})
        return side

    def vcpus(self, side):
        return [cpu['thread-id'] for cpu in self.qmp(side, 'query-cpus-fast')]

    def listen(self, destination):
        self.qmp(destination, 'migrate-incoming', uri='tcp:127.0.0.1:0')
        info = self.qmp(destination, 'query-migrate')
        return f"tcp:127.0.0.1:{info['socket-address'][0]['port']}"

    def prepare(self, source):
        self.set_rate(source, 1 << 40)          # else QEMU keeps to 128 MiB/s

    def set_rate(self, source, rate):
        self.qmp(source, 'migrate-set-parameters', **{'max-bandwidth': int(rate)})

    def slow_down(self, source, options):
        capabilities = [{'capability': name, 'state': True} for name in options]
        self.qmp(source, 'migrate-set-capabilities', capabilities=capabilities)

    def start(self, source, uri):
        source.say(json.dumps({'execute': 'migrate', 'arguments': {'uri': uri}}))

    def pause_before_switchover(self, source):
        self.qmp(source, 'migrate-set-capabilities', capabilities=[{'capability': 'pause-before-switchover', 'state': True}])

    def cancel(self, source):
        source.say(json.dumps({'execute': 'migrate_cancel'}))

    def has_become(self, source, state):
        messages = [json.loads(line) for line in source.lines]
        return any(m.get('event') == 'MIGRATION' and m['data']['status'] == state for m in messages)

    def completed(self, source):
        for line in source.lines:
            message = json.loads(line)
            status = message.get('data', {}).get('status') if message.get('event') == 'MIGRATION' else None
            if status == 'completed':
                return True
            if status == 'failed' or 'error' in message:
                source.die(line)
        source.lines.clear()
        return False
