/* A VMM whose memory can be handed over, with a device that owns file descriptors. A software guest counts in page 0 of
 * "low" while it runs; nobody writes anything else, so a hash without that page stands still.
 *
 *   hand LOW HIGH MIB [FLAG...]   LOW, HIGH: memfd, hugetlb, shm or anon, for each block of MIB MiB
 *   flags: fill=N           what memory holds (0: nothing)     writes-ram  the device says that its load writes RAM
 *          unmarked         nobody would see writes of "high"  no-fd       the blocks are mapped shared, without a file
 *          fds=N            so many descriptors in the device (at most 300); the first is a file that says "tap N"
 *          other-fds        the members are numbers here       early       the device is sent at setup
 * Commands, beside those of program.h: hash, hashes (of all, at the last stop and start), fds (open), counts, reasons,
 * tap, close-tap, replaced, seen, maps, peek OFFSET, poke OFFSET VALUE, remap, limit FDS, fail CALLBACK, die CALLBACK,
 * register HOW (a block that is wrong in this way). */
#include "program.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

enum { PAGE = 4096, FDS = 300 };

struct block {
    const char *name;
    uint8_t *host;
    uint64_t len, gpa;
    int fd;
};

struct device {
    uint32_t id, count;
    int fds[FDS];
};

static struct vmm {
    vmig *m;
    struct block low, high;
    struct device dev;
    pthread_t cpu;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, parked, quit;
    uint64_t stop_hash, start_hash;
    unsigned replaced;
    ino_t inode[2];                     /* of the files ram_replaced told us, low and high */
    char seen[64];                      /* how the device found its RAM when it was loaded */
    _Atomic(const char *) fails, dies;
    bool writes_ram, unmarked, no_fd, other_fds, early;
    unsigned fds, fill;
} vmm;

static _Noreturn void fatal(const char *what)
{
    fprintf(stderr, "hand: %s: %s [%s]\n", what, strerror(errno), vmig_errmsg());
    exit(1);
}

static uint64_t static_hash(void)
{
    uint64_t low = hash_bytes(vmm.low.host + PAGE, vmm.low.len - PAGE), high = hash_bytes(vmm.high.host, vmm.high.len);

    return low * 31 + high;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static int memory_file(const char *kind, uint64_t len)
{
    int fd = -1;

    if (strcmp(kind, "memfd") == 0)
        fd = memfd_create("guest", MFD_CLOEXEC);
    else if (strcmp(kind, "hugetlb") == 0)
        fd = memfd_create("guest", MFD_CLOEXEC | MFD_HUGETLB);
    else if (strcmp(kind, "shm") == 0) {
        char path[64];
        snprintf(path, sizeof path, "/dev/shm/vmig-hand-%d", getpid());
        fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        unlink(path);
    }
    if (fd < 0 || ftruncate(fd, (off_t)(len + (2 << 20))) < 0)
        fatal(kind);
    return fd;
}

/* The block begins 2 MiB into its file, so that an offset that is forgotten is noticed. */
static void make_block(struct block *b, const char *name, const char *kind, uint64_t len, uint64_t gpa)
{
    bool anonymous = strcmp(kind, "anon") == 0;

    *b = (struct block){ .name = name, .len = len, .gpa = gpa, .fd = -1 };
    if (!anonymous)
        b->fd = memory_file(kind, len);
    b->host = mmap(NULL, len, PROT_READ | PROT_WRITE, anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, b->fd,
                   anonymous ? 0 : 2 << 20);
    if (b->host == MAP_FAILED)
        fatal("mmap");
    for (uint64_t at = 0; vmm.fill && at < len; at += PAGE)
        for (uint64_t i = 0; i < 8; i++)
            ((uint64_t *)(b->host + at))[i * 64] = (at + 1) * vmm.fill + i;
}

static void map_words(const struct block *b, char *text, size_t room)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];

    snprintf(text, room, "none");
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long long from, to, inode, offset;
        char rights[8];
        if (sscanf(line, "%llx-%llx %7s %llx %*s %llu", &from, &to, rights, &offset, &inode) == 5 &&
            from <= (uintptr_t)b->host && (uintptr_t)b->host < to)
            snprintf(text, room, "%s inode=%llu offset=%llx", rights, inode, offset);
    }
    if (maps)
        fclose(maps);
}

/* ---- the guest and its hooks ------------------------------------------------------------------------------------- */

static int told(const char *callback)
{
    if (vmm.dies && strcmp(vmm.dies, callback) == 0)
        kill(getpid(), SIGKILL);
    return vmm.fails && strcmp(vmm.fails, callback) == 0 ? -EDOM : 0;
}

static void *cpu_thread(void *unused)
{
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&vmm.lock);
        while (!vmm.run && !vmm.quit) {
            vmm.parked = true;
            pthread_cond_broadcast(&vmm.changed);
            pthread_cond_wait(&vmm.changed, &vmm.lock);
        }
        vmm.parked = false;
        pthread_mutex_unlock(&vmm.lock);
        if (vmm.quit)
            return NULL;
        atomic_fetch_add((_Atomic uint64_t *)(void *)vmm.low.host, 1);
        vmig_dirty(vmm.m, vmm.low.host, 8);
        usleep(50);
    }
}

static int stop(void *unused)
{
    int err = told("stop");

    (void)unused;
    if (err)
        return err;
    pthread_mutex_lock(&vmm.lock);
    vmm.run = false;
    while (!vmm.parked)
        pthread_cond_wait(&vmm.changed, &vmm.lock);
    pthread_mutex_unlock(&vmm.lock);
    vmm.stop_hash = hash_bytes(vmm.low.host, vmm.low.len) + hash_bytes(vmm.high.host, vmm.high.len);
    return 0;
}

static int start(void *unused)
{
    int err = told("start");

    (void)unused;
    if (err)
        return err;
    vmm.start_hash = hash_bytes(vmm.low.host, vmm.low.len) + hash_bytes(vmm.high.host, vmm.high.len);
    pthread_mutex_lock(&vmm.lock);
    vmm.run = true;
    pthread_cond_broadcast(&vmm.changed);
    pthread_mutex_unlock(&vmm.lock);
    return 0;
}

static int ram_replaced(void *unused, const char *name, void *host, uint64_t len, int fd, uint64_t offset)
{
    struct block *b = strcmp(name, "low") == 0 ? &vmm.low : &vmm.high;
    struct stat st;

    (void)unused;
    if (host != b->host || len != b->len || offset != 2 << 20 || fstat(fd, &st) < 0 || vmig_bql_held(vmm.m))
        fatal("ram_replaced");
    vmm.replaced++;
    vmm.inode[b == &vmm.high] = st.st_ino;
    return told(b == &vmm.low ? "ram_replaced" : "ram_replaced-high");
}

static void no_log(void *unused, int level, const char *line)
{
    (void)unused;
    printf("note log %d %s\n", level, line);
}

/* ---- the device and the section ---------------------------------------------------------------------------------- */

static int pre_save(void *dev) { (void)dev; return told("pre_save"); }
static int post_save(void *dev) { (void)dev; return told("post_save"); }
static int pre_load(void *dev) { (void)dev; return told("pre_load"); }
static int post_load(void *dev, uint32_t version)
{
    (void)dev, (void)version;
    map_words(&vmm.low, vmm.seen, sizeof vmm.seen);
    return told("post_load");
}
static int section_complete(void *unused, vmig_writer *out)
{
    (void)unused;
    vmig_put_u32(out, 0xfeed);
    return told("complete");
}
static int section_load(void *unused, uint32_t part, uint32_t version, vmig_reader *in)
{
    (void)unused, (void)part, (void)version;
    return vmig_get_u32(in) == 0xfeed ? told("load") : -EINVAL;
}

static const vmig_field fields[] = {
    VMIG_U32(struct device, id), VMIG_U32(struct device, count), VMIG_FD_VARRAY(struct device, fds, count), VMIG_END,
};
static const vmig_field number_fields[] = {
    VMIG_U32(struct device, id), VMIG_U32(struct device, count), VMIG_I32_VARRAY(struct device, fds, count), VMIG_END,
};

static void open_fds(void)
{
    char text[32];

    vmm.dev.id = vmm.fill, vmm.dev.count = vmm.fds;
    for (unsigned i = 0; i < FDS; i++)
        vmm.dev.fds[i] = -1;
    if (!vmm.fill || vmm.other_fds)
        return;
    for (unsigned i = 0; i < vmm.fds; i++) {
        if (i == 1)
            continue;                   /* none travels as none */
        vmm.dev.fds[i] = memfd_create("tap", MFD_CLOEXEC);
        snprintf(text, sizeof text, "tap %u", i);
        if (vmm.dev.fds[i] < 0 || write(vmm.dev.fds[i], text, strlen(text)) < 0)
            fatal("tap");
    }
}

static void add_block(const struct block *b, uint32_t flags)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    ram.name = b->name, ram.host = b->host, ram.len = b->len, ram.gpa = b->gpa, ram.flags = flags;
    if (b->fd >= 0 && !vmm.no_fd)
        ram.flags |= VMIG_RAM_FD, ram.fd = b->fd, ram.fd_offset = 2 << 20;
    need(vmig_add_ram(vmm.m, &ram), b->name);
}

static void add_everything(void)
{
    vmig_device device = VMIG_SIZED(vmig_device);
    vmig_section_ops ops = VMIG_SIZED(vmig_section_ops);

    device.name = "nic", device.version = 1, device.fields = vmm.other_fds ? number_fields : fields;
    device.pre_save = pre_save, device.post_save = post_save, device.pre_load = pre_load, device.post_load = post_load;
    device.flags = (vmm.writes_ram ? VMIG_DEVICE_WRITES_RAM : 0) | (vmm.early ? VMIG_DEVICE_EARLY : 0);
    ops.complete = section_complete, ops.load = section_load;
    need(vmig_bql_lock(vmm.m), "lock");
    add_block(&vmm.low, VMIG_RAM_MARKED);
    add_block(&vmm.high, vmm.unmarked ? 0 : VMIG_RAM_MARKED);
    if (vmm.fds)
        need(vmig_add_device(vmm.m, &device, 0, &vmm.dev), "nic");
    need(vmig_add_section(vmm.m, "gpu", 1, &ops, &vmm, NULL), "gpu");
    need(vmig_bql_unlock(vmm.m), "unlock");
}

/* ---- commands ---------------------------------------------------------------------------------------------------- */

/* An address where a guest arrived is kept for questions about it. */
static bool is_listening(int fd)
{
    int on = 0;
    socklen_t len = sizeof on;

    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &on, &len) == 0 && on;
}

static unsigned open_count(void)
{
    unsigned n = 0;

    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0 && !is_listening(fd);
    return n;
}

/* Which of the device's descriptors say what they should, are close-on-exec, and are there. */
static void print_tap(void)
{
    unsigned good = 0, none = 0, cloexec = 0;

    for (unsigned i = 0; i < vmm.dev.count && i < FDS; i++) {
        char text[32] = "", want[32];
        ssize_t n = vmm.dev.fds[i] < 0 ? 0 : pread(vmm.dev.fds[i], text, sizeof text - 1, 0);
        snprintf(want, sizeof want, "tap %u", i);
        good += n > 0 && strcmp(text, want) == 0;
        none += vmm.dev.fds[i] == -1;
        cloexec += vmm.dev.fds[i] >= 0 && fcntl(vmm.dev.fds[i], F_GETFD) == FD_CLOEXEC;
    }
    printf("value id=%u count=%u good=%u none=%u cloexec=%u\n", vmm.dev.id, vmm.dev.count, good, none, cloexec);
}

/* Blocks that are not what they say; each must be refused, so nothing is ever registered. */
static void register_wrong(const char *how)
{
    vmig_ram ram = VMIG_SIZED(vmig_ram);
    uint64_t len = 16 * PAGE;
    int fd = memfd_create("wrong", MFD_CLOEXEC), other = memfd_create("other", MFD_CLOEXEC), pipes[2], named = fd;
    bool is_private = strcmp(how, "private") == 0, is_read_only = strcmp(how, "read-only") == 0;
    char path[64];
    uint8_t *at;

    if (ftruncate(fd, (off_t)len * 2) < 0 || ftruncate(other, (off_t)len * 2) < 0 || pipe(pipes) < 0)
        fatal("register");
    at = mmap(NULL, len, PROT_READ | (is_read_only ? 0 : PROT_WRITE), is_private ? MAP_PRIVATE : MAP_SHARED, fd, 0);
    ram.name = "wrong", ram.host = at, ram.len = len, ram.gpa = 1ull << 40, ram.flags = VMIG_RAM_FD | VMIG_RAM_MARKED;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (strcmp(how, "other") == 0)
        named = other;
    else if (strcmp(how, "offset") == 0)
        ram.fd_offset = PAGE;
    else if (strcmp(how, "odd-offset") == 0)
        ram.fd_offset = 1;
    else if (strcmp(how, "far") == 0)
        ram.fd_offset = UINT64_MAX - PAGE + 1;
    else if (strcmp(how, "beyond") == 0)
        ram.fd_offset = len + PAGE;
    else if (strcmp(how, "part") == 0)
        at = mmap(at + 8 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED, fd, 0);
    else if (strcmp(how, "hole") == 0)
        munmap(at + 8 * PAGE, PAGE);
    else if (strcmp(how, "pipe") == 0)
        named = pipes[1];
    else if (strcmp(how, "read-only-fd") == 0)
        named = open(path, O_RDONLY | O_CLOEXEC);
    else if (strcmp(how, "closed") == 0)
        named = -1;
    else if (strcmp(how, "storage") == 0)
        ram.flags |= VMIG_RAM_SHARED_STORAGE;
    ram.fd = named;
    need(vmig_bql_lock(vmm.m), "lock");
    answer("register", vmig_add_ram(vmm.m, &ram));
    need(vmig_bql_unlock(vmm.m), "unlock");
    munmap(ram.host, len);
    close(fd), close(other), close(pipes[0]), close(pipes[1]);
    if (named != fd && named != other && named != pipes[1] && named >= 0)
        close(named);
}

/* From now on; "none" ends it. Each name has a place of its own, for a hook may be reading the one before. */
static void misbehave(_Atomic(const char *) *how, const char *callback)
{
    static char names[64][32];
    static unsigned used;
    char *name = names[used++ % 64];

    snprintf(name, sizeof names[0], "%s", callback ? callback : "none");
    atomic_store(how, strcmp(name, "none") ? name : NULL);
    printf("ok\n");
}

static bool own(void *unused, const char *verb, char *rest)
{
    char low[64], high[64];

    (void)unused;
    if (strcmp(verb, "hash") == 0)
        printf("value %" PRIx64 "\n", static_hash());
    else if (strcmp(verb, "hashes") == 0)
        printf("value %" PRIx64 " %" PRIx64 "\n", vmm.stop_hash, vmm.start_hash);
    else if (strcmp(verb, "fds") == 0)
        printf("value %u\n", open_count());
    else if (strcmp(verb, "counts") == 0)
        printf("value %" PRIu64 "\n", *(volatile uint64_t *)vmm.low.host);
    else if (strcmp(verb, "reasons") == 0)
        printf("value %d\n", vmig_get_stop_reasons(vmm.m));
    else if (strcmp(verb, "tap") == 0)
        print_tap();
    else if (strcmp(verb, "close-tap") == 0) {
        for (unsigned i = 0; i < FDS; i++)
            if (vmm.dev.fds[i] >= 0)
                close(vmm.dev.fds[i]), vmm.dev.fds[i] = -1;
        printf("ok\n");
    } else if (strcmp(verb, "replaced") == 0)
        printf("value %u %lu %lu\n", vmm.replaced, (unsigned long)vmm.inode[0], (unsigned long)vmm.inode[1]);
    else if (strcmp(verb, "seen") == 0)
        printf("value %s\n", vmm.seen);
    else if (strcmp(verb, "maps") == 0) {
        map_words(&vmm.low, low, sizeof low), map_words(&vmm.high, high, sizeof high);
        printf("value %s / %s\n", low, high);
    } else if (strcmp(verb, "peek") == 0)
        printf("value %" PRIu64 "\n", *(volatile uint64_t *)(vmm.low.host + strtoull(rest, NULL, 0)));
    else if (strcmp(verb, "poke") == 0) {
        char *value = rest, *offset = strsep(&value, " ");
        *(volatile uint64_t *)(vmm.low.host + strtoull(offset, NULL, 0)) = strtoull(value, NULL, 0);
        printf("ok\n");
    } else if (strcmp(verb, "remap") == 0) {    /* behind the library's back */
        void *at = mmap(vmm.high.host, PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        answer(verb, at == MAP_FAILED ? -errno : 0);
    } else if (strcmp(verb, "register") == 0)
        register_wrong(rest);
    else if (strcmp(verb, "limit") == 0) {
        struct rlimit limit = { strtoull(rest, NULL, 0), 1024 };
        answer(verb, setrlimit(RLIMIT_NOFILE, &limit));
    } else if (strcmp(verb, "fail") == 0)
        misbehave(&vmm.fails, rest);
    else if (strcmp(verb, "die") == 0)
        misbehave(&vmm.dies, rest);
    else
        return false;
    return true;
}

static void flag(const char *text)
{
    if (sscanf(text, "fill=%u", &vmm.fill) == 1 || sscanf(text, "fds=%u", &vmm.fds) == 1)
        return;
    if (strcmp(text, "writes-ram") == 0)
        vmm.writes_ram = true;
    else if (strcmp(text, "unmarked") == 0)
        vmm.unmarked = true;
    else if (strcmp(text, "no-fd") == 0)
        vmm.no_fd = true;
    else if (strcmp(text, "other-fds") == 0)
        vmm.other_fds = true;
    else if (strcmp(text, "early") == 0)
        vmm.early = true;
    else
        fatal(text);
}

int main(int argc, char **argv)
{
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    uint64_t len;

    if (argc < 4)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    for (int i = 4; i < argc; i++)
        flag(argv[i]);
    len = strtoull(argv[3], NULL, 0) << 20;
    make_block(&vmm.low, "low", argv[1], len, 0), make_block(&vmm.high, "high", argv[2], len, len);
    open_fds();
    pthread_mutex_init(&vmm.lock, NULL), pthread_cond_init(&vmm.changed, NULL);
    ops.stop = stop, ops.start = start, ops.ram_replaced = ram_replaced, ops.log = no_log;
    need(vmig_new(&ops, &vmm, &vmm.m), "vmig_new");
    add_everything();
    if (pthread_create(&vmm.cpu, NULL, cpu_thread, NULL))
        fatal("thread");
    serve(vmm.m, own, NULL);
    pthread_mutex_lock(&vmm.lock);
    vmm.quit = true;
    pthread_cond_broadcast(&vmm.changed);
    pthread_mutex_unlock(&vmm.lock);
    pthread_join(vmm.cpu, NULL);        /* it uses the handle: it must not outlive it */
    pthread_mutex_lock(&vmm.lock);
    vmm.parked = true;                  /* a stop hook of the migration that vmig_free ends must not wait */
    pthread_mutex_unlock(&vmm.lock);
    vmig_free(vmm.m);
    return 0;
}
