"""One move of the benchmark's guest, by two vmig VMMs or by two QEMUs, watched from outside in the same way.

The guest says one byte per tick on port 0xe9; both VMMs pass it on at once, and it is stamped here, on arrival. What is
measured begins when the command to migrate is given and ends when the source says it completed and the destination's
guest has been heard.
"""
import fcntl, json, os, selectors, socket, subprocess, time

START_LIMIT = 60                # seconds until the guest filled its memory and beats
MOVE_LIMIT = 120
STEADY = 0.5                    # seconds it runs before it moves
QEMU_MACHINE = ('microvm,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off,acpi=off,auto-kernel-cmdline=off,'
                'memory-backend=ram')


class Failed(Exception):
    pass


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


class Side:
    """A process with a guest: its heartbeats, its lines, its CPU time."""

    def __init__(self, name, argv, pass_fds, beat, talk_in, talk_out, log, **more):
        self.name, self.beat, self.talk_in, self.talk_out, self.log = name, beat, talk_in, talk_out, log
        self.beats, self.lines, self.partial = [], [], b''
        self.process = subprocess.Popen(argv, pass_fds=pass_fds, stderr=open(log, 'wb'), **more)

    def say(self, line):
        os.write(self.talk_in, line.encode() + b'\n')

    def hear(self, data):
        *whole, self.partial = (self.partial + data).split(b'\n')
        self.lines += [line.decode() for line in whole]

    def cpu_seconds(self):
        """Of the whole process, threads that ended included, but for the guest's own: it spins between two ticks."""
        base = f'/proc/{self.process.pid}'
        with open(f'{base}/stat') as f:
            fields = f.read().rsplit(') ', 1)[1].split()
        total = (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
        for task in os.listdir(f'{base}/task'):
            try:
                with open(f'{base}/task/{task}/comm') as f:
                    guest = f.read().startswith(('vcpu ', 'CPU '))
                with open(f'{base}/task/{task}/schedstat') as f:
                    total -= int(f.read().split()[0]) / 1e9 if guest else 0
            except FileNotFoundError:
                pass            # a thread that just ended
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
    """Source and destination. Subclasses say how to launch, command and understand them."""

    def __init__(self, image, mib, folder):
        self.image, self.mib, self.folder, self.sides = image, mib, folder, []
        self.selector = selectors.DefaultSelector()

    def launch(self, name, incoming):
        side = self.make(name, incoming)
        self.sides.append(side)
        self.selector.register(side.beat, selectors.EVENT_READ, (side, True))
        self.selector.register(side.talk_out, selectors.EVENT_READ, (side, False))
        return side

    def watch(self, limit, until, what):
        """Listens to both sides until the condition holds."""
        end = time.monotonic() + limit
        while not until():
            left = end - time.monotonic()
            if left <= 0:
                raise Failed(f'{self.kind}: {what}: not within {limit} seconds')
            for key, _ in self.selector.select(left):
                side, is_beat = key.data
                data = os.read(key.fd, 65536)
                now = time.monotonic()
                if not data:
                    side.process.wait()
                    side.die(f'ended with status {side.process.returncode}: {what}')
                if is_beat:
                    self.on_beat(side, data, now)
                else:
                    side.hear(data)

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

    def pass_time(self, seconds):
        end = time.monotonic() + seconds
        self.watch(seconds + 1, lambda: time.monotonic() >= end, 'waiting')

    def on_beat(self, side, data, now):
        side.beats.append(now)

    def move(self):
        """Moves the guest once; what it took."""
        try:
            destination = self.launch('destination', True)
            uri = self.listen(destination)
            source = self.launch('source', False)
            self.watch(START_LIMIT, lambda: source.beats, 'the guest did not say that it is ready')
            self.pass_time(STEADY)
            self.prepare(source, destination)
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
                'stall_ms': max((b - a for a, b in zip(during, during[1:])), default=0) * 1e3,
                'cpu_s': cpu,
            }
        finally:
            for side in self.sides:
                side.end()
            self.selector.close()


class Vmig(Pair):
    kind = 'vmig'

    def __init__(self, vmm, *args):
        super().__init__(*args)
        self.vmm = vmm

    def make(self, name, incoming):
        beats, beats_in = os.pipe()
        commands_out, commands = os.pipe()
        lines, lines_in = os.pipe()
        argv = [self.vmm, '--mem', str(self.mib), '--firmware', self.image, '--events-fd', str(beats_in)]
        if incoming:
            argv += ['--incoming', 'tcp:127.0.0.1:0']
        side = Side(f'vmig {name}', argv, [beats_in], beats, commands, lines, f'{self.folder}/vmig-{name}.log',
                    stdin=commands_out, stdout=lines_in)
        for fd in (beats_in, commands_out, lines_in):
            os.close(fd)
        return side

    def on_beat(self, side, data, now):
        if b'beat' in data:     # the same pipe tells of stops and starts
            side.beats.append(now)

    def listen(self, destination):
        said = lambda line: line.split()[1] if line.startswith('listening ') else None
        return self.answer(destination, said, 'waiting for its address')

    def prepare(self, source, destination):
        for option, value in (('downtime-limit', 300), ('max-bandwidth', 0)):
            source.say(f'set {option} {value}')
            self.answer(source, lambda line: line if line == 'ok' else None, f'set {option}')

    def start(self, source, uri):
        source.say(f'migrate {uri}')

    def completed(self, source):
        for line in source.lines:
            if line.startswith(('event failed', 'error')):
                source.die(line)
        return 'event completed' in source.lines


class Qemu(Pair):
    kind = 'QEMU'

    def __init__(self, program, *args):
        super().__init__(*args)
        self.program = program

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
                    f'{self.folder}/qemu-{name}.log', stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
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
        return side

    def listen(self, destination):
        self.qmp(destination, 'migrate-incoming', uri='tcp:127.0.0.1:0')
        info = self.qmp(destination, 'query-migrate')
        return f"tcp:127.0.0.1:{info['socket-address'][0]['port']}"

    def prepare(self, source, destination):
        events = [{'capability': 'events', 'state': True}]
        self.qmp(source, 'migrate-set-capabilities', capabilities=events)
        parameters = {'downtime-limit': 300, 'max-bandwidth': 0}
        self.qmp(source, 'migrate-set-parameters', **parameters)

    def start(self, source, uri):
        source.say(json.dumps({'execute': 'migrate', 'arguments': {'uri': uri}}))

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
