/* A VMM steered by lines on stdin, one answer line for each; tests/bad_input.rs plays the hostile peer.
 *
 *   hostile [KEY=VALUE...]     low, high: pages; high-name; uart-name; uart, section: versions; fill: 0 for an empty guest;
 *                              more: name of a further device; other: 1 for other fields; build: registers what fits, and
 *                              only when a source's configuration says "build"
 *
 * Commands: in URI, out URI, set OPTION VALUE, get OPTION, wait MS, start, stop, resolve N, cancel, idle N, counts,
 * check URI, config TEXT, starts, hash, look, left, fds, save PATH, and sweep GOOD, which reads "cut N", "set N BYTE" or "file PATH" lines up to
 * "end" and loads each so damaged stream, and the good one after it, into the same guest. */
#include "guest.h"

#include <dirent.h>

static struct guest g;
static struct shape shape;
static bool built;
static const char *point = "the good stream";

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;

    CHECK(dir, "%s: %s", path, strerror(errno));
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void print_error(void)
{
    char *error = vmig_get_error(g.m);

    printf("%s %d %s\n", vmig_state_name(state_of(&g)), vmig_get_stop_reasons(g.m), error ? error : "{}");
    vmig_string_free(error);
}

static void print_result(int result)
{
    if (result < 0)
        printf("%d %s\n", result, vmig_errmsg());
    else
        printf("%d\n", result);
}

static uint8_t *read_file(const char *path, size_t *len)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    uint8_t *bytes;

    CHECK(fd >= 0 && fstat(fd, &st) == 0, "%s: %s", path, strerror(errno));
    *len = (size_t)st.st_size;
    bytes = malloc(*len + 1);
    CHECK(bytes && read(fd, bytes, *len) == (ssize_t)*len, "%s: %s", path, strerror(errno));
    close(fd);
    return bytes;
}

/* Loads a stream into the guest, which is stopped and full of rubbish. */
static uint32_t load(const uint8_t *bytes, size_t len)
{
    char uri[32];
    unsigned starts = g.calls[CB_START];
    int fd = memfd_create("stream", MFD_CLOEXEC);

    memset(g.low, 0x5a, g.low_bytes), memset(g.high, 0xa5, g.high_bytes);
    memset(g.blob, 0, sizeof g.blob), memset(&g.dev, 0, sizeof g.dev);
    CHECK(fd >= 0 && write(fd, bytes, len) == (ssize_t)len && lseek(fd, 0, SEEK_SET) == 0, "memfd");
    snprintf(uri, sizeof uri, "fd:%d", fd);
    CHECK(vmig_incoming(g.m, uri) == 0, "incoming");
    close(fd);
    CHECK(vmig_wait(g.m, WAIT_MS) == 1, "the load ends: %s", point);
    if (state_of(&g) == VMIG_STATE_COMPLETED) {
        CHECK(g.calls[CB_START] == starts + 1 || vmig_get_stop_reasons(g.m) == VMIG_STOPPED_BY_USER, "arrived");
        CHECK(vmig_stop(g.m) == 0, "stop");
    } else {
        CHECK(state_of(&g) == VMIG_STATE_FAILED && g.calls[CB_START] == starts, "failed and not started");
        CHECK(vmig_get_stop_reasons(g.m) != 0, "not running");
        CHECK(!(vmig_get_stop_reasons(g.m) & VMIG_STOPPED_NOT_OWNER) || vmig_start(g.m) == -EPERM, "half a guest cannot run");
    }
    return state_of(&g);
}

static void one_point(const char *line, const uint8_t *good, size_t len, uint64_t good_hash)
{
    size_t at, n = len;
    unsigned value;
    uint8_t *bytes;
    char path[4096];

    if (sscanf(line, "file %4095s", path) == 1) {
        bytes = read_file(path, &n);
    } else {
        CHECK((bytes = malloc(len + 1)) != NULL, "malloc");
        memcpy(bytes, good, len);
        if (sscanf(line, "cut %zu", &at) == 1)
            n = at;
        else if (sscanf(line, "set %zu %u", &at, &value) == 2 && at < len)
            bytes[at] = (uint8_t)value;
        else
            CHECK(false, "point '%s'", line);
    }
    load(bytes, n);
    free(bytes);
    print_error();
    CHECK(load(good, len) == VMIG_STATE_COMPLETED && g.arrival_hash == good_hash, "after '%s' a good guest arrives", line);
}

static void sweep(const char *path)
{
    size_t len;
    uint8_t *good = read_file(path, &len);
    char line[4200];
    uint64_t hash;
    unsigned fds, tasks;

    g.idle = true;
    CHECK(load(good, len) == VMIG_STATE_COMPLETED, "the good stream loads");
    hash = g.arrival_hash;
    fds = entries("/proc/self/fd"), tasks = entries("/proc/self/task");
    while (fgets(line, sizeof line, stdin) && strcmp(line, "end\n")) {
        line[strcspn(line, "\n")] = 0;
        point = line;
        one_point(line, good, len, hash);
    }
    CHECK(entries("/proc/self/fd") == fds, "%u fds before, %u after", fds, entries("/proc/self/fd"));
    /* The last migration's thread may be known until the next one begins. */
    CHECK(entries("/proc/self/task") <= tasks + 1, "%u threads before, %u after", tasks, entries("/proc/self/task"));
    free(good);
    printf("swept %016" PRIx64 "\n", hash);
}

static int save(const char *path)
{
    char uri[32];
    int result, fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(fd >= 0, "%s: %s", path, strerror(errno));
    snprintf(uri, sizeof uri, "fd:%d", fd);
    result = vmig_outgoing(g.m, uri);
    close(fd);
    return result < 0 ? result : vmig_wait(g.m, WAIT_MS);
}

/* `call` at a descriptor; it must fail with `errno` at once and name the descriptor. */
static void refused(int (*call)(vmig *, const char *), int fd, int error)
{
    char uri[32];
    int result;

    snprintf(uri, sizeof uri, "fd:%d", fd);
    result = call(g.m, uri);
    CHECK(result == -error && strstr(vmig_errmsg(), uri) == NULL && strstr(vmig_errmsg(), "fd "), "%s: %d", uri, result);
}

/* Descriptors of every unsuitable kind; the guest, which runs, must not notice. */
static void descriptors(void)
{
    int pipes[2], closed = dup(0), directory = open("/", O_RDONLY | O_CLOEXEC), null = open("/dev/null", O_WRONLY);
    unsigned stops = g.calls[CB_STOP], fds;
    char uri[32];

    CHECK(closed >= 0 && directory >= 0 && null >= 0 && pipe2(pipes, O_CLOEXEC) == 0, "%s", strerror(errno));
    close(closed);
    fds = entries("/proc/self/fd");
    refused(vmig_outgoing, closed, EBADF), refused(vmig_outgoing, pipes[0], EBADF);
    refused(vmig_outgoing, directory, EBADF), refused(vmig_outgoing, 0x7fffffff, EBADF);
    CHECK(vmig_incoming(g.m, "fd:0") == -EBUSY, "a guest runs here");
    CHECK(vmig_stop(g.m) == 0, "stop");
    refused(vmig_incoming, closed, EBADF), refused(vmig_incoming, pipes[1], EBADF), refused(vmig_incoming, null, EBADF);
    CHECK(vmig_start(g.m) == 0 && state_of(&g) == VMIG_STATE_NONE, "a failed call changes nothing");
    CHECK(entries("/proc/self/fd") == fds, "a failed call keeps no descriptor");
    /* Nobody reads the pipe any more: an error, not a signal. */
    close(pipes[0]);
    snprintf(uri, sizeof uri, "fd:%d", pipes[1]);
    CHECK(vmig_outgoing(g.m, uri) == 0, "outgoing");
    close(pipes[1]);
    CHECK(vmig_wait(g.m, WAIT_MS) == 1 && state_of(&g) == VMIG_STATE_FAILED, "EPIPE");
    CHECK(g.calls[CB_STOP] == stops + 1 && vmig_get_stop_reasons(g.m) == 0, "it runs on");
    close(directory), close(null);
    printf("fds done\n");
}

static void print_check(const char *uri)
{
    vmig_check_report r = VMIG_SIZED(vmig_check_report);
    char *list = NULL;
    int found = vmig_check(g.m, uri, &r, &list);

    if (found < 0) {
        print_result(found);
        return;
    }
    CHECK(r.size == sizeof r && r.hello >= r.compare && r.connect > 0, "times");
    printf("%d %u %u %" PRIu64 " %s\n", found, r.devices_timed, r.devices_untimed, r.device_bytes, list);
    vmig_string_free(list);
}

/* Lets the destination build itself. */
static int config(void *opaque, const void *blob, size_t len)
{
    CHECK(opaque == &g && len > 0, "%zu bytes of configuration", len);
    if (len != 5 || memcmp(blob, "build", 5))
        return -ENOEXEC;
    if (built)
        return 0;
    big_lock(&g);
    add_parts(&g, &shape);
    big_unlock(&g);
    built = true;
    return 0;
}

static void print_text(char *text)
{
    printf("%s\n", text ? text : vmig_errmsg());
    vmig_string_free(text);
}

static void command(char *line)
{
    char *word = strtok(line, " "), *first = strtok(NULL, " "), *rest = strtok(NULL, "");

    if (!word)
        printf("?\n");
    else if (!strcmp(word, "in"))
        print_result(vmig_incoming(g.m, first ? first : ""));
    else if (!strcmp(word, "out"))
        print_result(vmig_outgoing(g.m, first ? first : ""));
    else if (!strcmp(word, "set"))
        print_result(vmig_set(g.m, first, rest));
    else if (!strcmp(word, "get"))
        print_text(vmig_get(g.m, first));
    else if (!strcmp(word, "check"))
        print_check(first);
    else if (!strcmp(word, "config"))
        print_result(vmig_set_config(g.m, first, first ? strlen(first) : 0));
    else if (!strcmp(word, "wait"))
        vmig_wait(g.m, atoi(first)), print_error();
    else if (!strcmp(word, "look"))
        print_error();
    else if (!strcmp(word, "start"))
        print_result(vmig_start(g.m));
    else if (!strcmp(word, "stop"))
        print_result(vmig_stop(g.m));
    else if (!strcmp(word, "resolve"))
        print_result(vmig_resolve(g.m, atoi(first)));
    else if (!strcmp(word, "cancel"))
        print_result(vmig_cancel(g.m));
    else if (!strcmp(word, "idle"))
        g.idle = atoi(first), usleep(10000), printf("0\n");
    else if (!strcmp(word, "counts"))
        printf("%d\n", counts_on(&g));
    else if (!strcmp(word, "starts"))
        printf("%u\n", g.calls[CB_START]);
    else if (!strcmp(word, "hash"))     /* as it is, and as it was when the guest was last started */
        printf("%016" PRIx64 " %016" PRIx64 "\n", guest_hash(&g), g.arrival_hash);
    else if (!strcmp(word, "save"))
        print_result(save(first));
    else if (!strcmp(word, "left"))     /* open descriptors and threads */
        printf("%u %u\n", entries("/proc/self/fd"), entries("/proc/self/task"));
    else if (!strcmp(word, "fds"))
        descriptors();
    else if (!strcmp(word, "sweep"))
        sweep(first);
    else
        printf("?\n");
}

int main(int argc, char **argv)
{
    uint8_t fill = 17;
    char line[66000];

    for (int i = 1; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        CHECK(value, "%s", argv[i]);
        *value++ = 0;
        if (!strcmp(argv[i], "low")) shape.low_pages = (size_t)atoi(value);
        else if (!strcmp(argv[i], "high")) shape.high_pages = (size_t)atoi(value);
        else if (!strcmp(argv[i], "high-name")) shape.high_name = value;
        else if (!strcmp(argv[i], "uart-name")) shape.uart_name = value;
        else if (!strcmp(argv[i], "uart")) shape.uart_version = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "section")) shape.section_version = (uint32_t)atoi(value);
        else if (!strcmp(argv[i], "more")) shape.more = value;
        else if (!strcmp(argv[i], "other")) shape.other_uart = atoi(value);
        else if (!strcmp(argv[i], "build")) shape.unbuilt = 1, shape.config = config;
        else if (!strcmp(argv[i], "fill")) fill = (uint8_t)atoi(value);
        else CHECK(false, "%s", argv[i]);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    guest_new(&g, &shape, fill);
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        command(line);
    }
    guest_free(&g);
    return 0;
}
