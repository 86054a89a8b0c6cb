"""What crosses the wire, as the kernel counts it: a loopback of our own, and its counters.

Two counters, for two questions. The loopback device's is one short read (some microseconds), so it can be taken at every
heartbeat, and it outlives the connections; but packets sent twice are in it, which on a busy loopback are some tenths of
a percent. The connections' own (tcp_info) leaves these out and is exact to the byte, but takes a fifth of a millisecond.
"""
import ctypes, errno, fcntl, os, socket, struct, time

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
# What each packet of the loopback device carries beside the stream: Ethernet, IPv4, TCP with time stamps.
HEADERS = 14 + 20 + 32
SOCK_DIAG, DUMP_REQUEST, NLMSG_ERROR, NLMSG_DONE = 20, 0x301, 2, 3
INET_DIAG_INFO, IPPROTO_TCP = 2, 6
BYTES_SENT_AT = 200                     # in struct tcp_info; bytes sent again follow


def own_network():
    """Enters a network where only the loopback is, and nobody else. False: not allowed, so others' bytes may count."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, SIOCSIFFLAGS, struct.pack('16sh14x', b'lo', IFF_UP | IFF_RUNNING))
    return True


class Loopback:
    """Bytes of streams that crossed the loopback device, but for what was sent twice."""

    def __init__(self):
        self.fd = os.open('/proc/self/net/dev', os.O_RDONLY | os.O_CLOEXEC)

    def read(self):
        text = os.pread(self.fd, 8192, 0)
        fields = text[text.index(b'lo:') + 3:].split()
        sent, packets = int(fields[8]), int(fields[9])
        return sent - HEADERS * packets

    def close(self):
        os.close(self.fd)


class Connections:
    """Bytes that all TCP connections of this network sent, each byte once."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_INET_DIAG
                                    if hasattr(socket, 'NETLINK_INET_DIAG') else 4)
        self.sent = {}                  # by the kernel's name of the connection: closed ones keep what they had

    def read(self):
        """(earliest time, latest time, bytes): the count is of some moment between the two."""
        ask = struct.pack('<BBBBI', socket.AF_INET, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0, 0xffffffff) + bytes(48)
        before = time.monotonic()
        self.socket.send(struct.pack('<IHHII', 16 + len(ask), SOCK_DIAG, DUMP_REQUEST, 1, 0) + ask)
        while self.take(self.socket.recv(1 << 16)):
            pass
        return before, time.monotonic(), sum(self.sent.values())

    def take(self, data):
        while data:
            length, kind = struct.unpack_from('<IH', data)
            if kind == NLMSG_DONE:
                return False
            if kind == NLMSG_ERROR:
                raise OSError(errno.EIO, 'the kernel does not tell of its connections')
            self.take_one(data[16:length])
            data = data[(length + 3) & ~3:]
        return True

    def take_one(self, message):
        name, at = message[44:52], 72
        while at + 4 <= len(message):
            length, kind = struct.unpack_from('<HH', message, at)
            if length < 4:
                return
            if kind == INET_DIAG_INFO and length >= 4 + BYTES_SENT_AT + 16:
                sent, again = struct.unpack_from('<QQ', message, at + 4 + BYTES_SENT_AT)
                self.sent[name] = max(sent - again, self.sent.get(name, 0))
            at += (length + 3) & ~3

    def close(self):
        self.socket.close()


def worst_excess(samples, rates):
    """The most bytes by which any stretch of time between two samples exceeded what the rate allowed for it.

    samples: as Connections.read gives them, in order. rates: (from when on, bytes per second), in order. Where a sample's
    moment is uncertain it is taken in favour of the program.
    """
    def allowed(t):
        total = 0
        for (begin, rate), (end, _) in zip(rates, rates[1:] + [(t, 0)]):
            total += rate * max(0, min(t, end) - begin)
        return total
    least, worst = None, 0
    for before, after, sent in samples:
        if least is not None:
            worst = max(worst, sent - allowed(after) - least)
        start = sent - allowed(before)
        least = start if least is None else min(least, start)
    return worst
