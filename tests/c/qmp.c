/* QMP from C: requests as strings, commands of the VMM's, and what a server leaves behind.
 *   qmp strings | commands | leaves-nothing UNIX-PATH | inside UNIX-PATH | oob UNIX-PATH
 * Prints "CASE done" as its last line. */
#include "guest.h"

#include <dirent.h>
#include <sys/stat.h>
#include <sys/un.h>

static struct guest g;

static char *ask(const char *request)
{
    char *answer = vmig_qmp(g.m, request);

    CHECK(answer, "%s", request);
    return answer;
}

static void says(const char *request, const char *part)
{
    char *answer = ask(request);

    CHECK(strstr(answer, part), "%s: %s, without %s", request, answer, part);
    vmig_string_free(answer);
}

static void case_strings(void)
{
    char deep[400], *deeper = malloc(100001);

    says("{\"execute\": \"query-status\", \"id\": 7}", "\"id\":7");
    says("{\"execute\": \"query-status\"}", "\"running\":true");
    says("{\"execute\": \"stop\"}", "{\"return\":{}}");
    CHECK(vmig_get_stop_reasons(g.m) == VMIG_STOPPED_BY_USER, "stopped");
    says("{\"execute\": \"query-status\"}", "\"paused\"");
    says("{\"execute\": \"cont\"}", "{\"return\":{}}");
    CHECK(vmig_get_stop_reasons(g.m) == 0, "running");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"downtime-limit\": 77}}", "{\"return\":{}}");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"downtime-limit\":77");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"defaults\": \"qemu\", \"downtime-limit\": 78}}", "{}");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"max-bandwidth\":134217728");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"downtime-limit\":78");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"stall-timeout\": 0}}", "range of 1 to (3600 * 1000) ms");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"tls-creds\": \"x\"}}", "does not obey it: it stays");
    says("{\"execute\": \"migrate-set-capabilities\", \"arguments\": {\"capabilities\": [{\"capability\": \"events\", "
         "\"state\": false}, {\"capability\": \"xbzrle\", \"state\": true}]}}", "'xbzrle' is QEMU's");
    says("{\"execute\": \"query-migrate-capabilities\"}", "{\"capability\":\"multifd\",\"state\":false}");
    says("{\"execute\": \"migrate-start-postcopy\"}", "postcopy does not exist");
    says("{\"execute\": \"calc-dirty-rate\", \"arguments\": {\"calc-time\": 61}}", "out of range");
    says("{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"fd:999\"}}", "fd 999");
    says("{\"execute\": \"getfd\", \"arguments\": {\"fdname\": \"x\"}}", "No file descriptor supplied");
    /* What the VMM set is its business, until a client sets one of the same pair. */
    CHECK(vmig_set(g.m, "cpu-throttle-initial", "99") == 0 && vmig_set(g.m, "max-cpu-throttle", "50") == 0, "throttles");
    CHECK(vmig_set(g.m, "switchover-ack", "on") == 0 && vmig_set(g.m, "return-path", "off") == 0, "capabilities");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"max-bandwidth\": 5}}", "{\"return\":{}}");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"cpu-throttle-initial\": 98}}", "'max_cpu_throttle'");
    says("{\"execute\": \"migrate-set-capabilities\", \"arguments\": {\"capabilities\": [{\"capability\": \"events\", "
         "\"state\": true}]}}", "{\"return\":{}}");
    says("{\"execute\": \"migrate-set-capabilities\", \"arguments\": {\"capabilities\": [{\"capability\": \"switchover-ack\", "
         "\"state\": true}]}}", "requires capability 'return-path'");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"defaults\": \"vmig\"}}", "{}");
    says("nonsense", "JSON parse error");
    says("{\"execute\": 1e999}", "JSON parse error");
    memset(deep, '[', sizeof deep), deep[sizeof deep - 1] = 0;
    says(deep, "recursion limit");
    memset(deeper, '[', 100000), deeper[100000] = 0;
    says(deeper, "recursion limit");
    free(deeper);
    CHECK(vmig_block(g.m, "a device of glass") > 0, "a blocker");
    says("{\"execute\": \"query-migrate\"}", "\"blocked-reasons\":[\"a device of glass\"]");
    says("{\"execute\": \"migrate\", \"arguments\": {\"uri\": \"tcp::1\"}}", "a device of glass");
    says("{\"execute\": \"announce-self\", \"arguments\": {\"initial\": 1, \"max\": 1, \"rounds\": 1, \"step\": 1}}", "{}");
    CHECK(g.calls[CB_ANNOUNCE] == 1, "the hook is called %u times", g.calls[CB_ANNOUNCE]);
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"dispatch\": \"auto\"}}", "{\"return\":{}}");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"dispatch\": \"manual\", \"downtime-limit\": 7}}",
         "the VMM itself sets it");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"downtime-limit\": 8, \"trace-file\": \"/tmp/x\"}}", "{}");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"trace-file\":\"/tmp/x\"");
    says("{\"execute\": \"migrate-set-parameters\", \"arguments\": {\"defaults\": \"vmig\"}}", "{}");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"downtime-limit\":300");
    says("{\"execute\": \"query-migrate-parameters\"}", "\"trace-file\":\"none\"");
}

/* ---- commands of the VMM's --------------------------------------------------------------------------------------- */

static unsigned destroyed;
static void destroy(void *opaque) { (void)opaque, destroyed++; }

static int echo(void *opaque, const char *arguments, vmig_reply *reply)
{
    CHECK(opaque == &g, "the pointer");
    return vmig_reply_json(reply, arguments);
}

static int fail(void *opaque, const char *arguments, vmig_reply *reply)
{
    (void)opaque;
    if (strstr(arguments, "words"))
        vmig_reply_error(reply, "the lid is \"open\"");
    return strstr(arguments, "zero") ? 0 : -EBUSY;
}

/* From inside a command the guest cannot be freed, and everything else goes. */
static int inside(void *opaque, const char *arguments, vmig_reply *reply)
{
    char *answer = vmig_qmp(g.m, "{\"execute\": \"echo\", \"arguments\": {\"deep\": [1, 2]}}");

    (void)opaque, (void)arguments;
    CHECK(answer, "a command inside a command");
    CHECK(vmig_stop(g.m) == 0 && vmig_start(g.m) == 0, "stop and start");
    vmig_reply_json(reply, answer);
    vmig_string_free(answer);
    return 0;
}

static void case_commands(void)
{
    CHECK(vmig_qmp_add(g.m, "echo", echo, &g, destroy) == 0, "echo");
    CHECK(vmig_qmp_add(g.m, "fail", fail, NULL, destroy) == 0, "fail");
    CHECK(vmig_qmp_add(g.m, "inside", inside, NULL, NULL) == 0, "inside");
    says("{\"execute\": \"echo\"}", "{\"return\":{}}");
    says("{\"execute\": \"echo\", \"arguments\": {\"x\": [null, \"\\u00e9\\n\"]}, \"id\": \"i\"}",
         "{\"id\":\"i\",\"return\":{\"x\":[null,\"\xc3\xa9\\n\"]}}");
    says("{\"execute\": \"fail\"}", "Device or resource busy");
    says("{\"execute\": \"fail\", \"arguments\": {\"words\": 1}}", "the lid is \\\"open\\\"");
    says("{\"execute\": \"fail\", \"arguments\": {\"words\": 1, \"zero\": 1}}", "\"error\"");
    says("{\"execute\": \"inside\"}", "{\"return\":{\"return\":{\"deep\":[1,2]}}}");
    says("{\"exec-oob\": \"echo\"}", "does not support OOB");
    says("{\"execute\": \"query-commands\"}", "{\"name\":\"echo\"}");
    says("{\"execute\": \"query-qmp-schema\"}", "\"name\":\"inside\"");
    CHECK(destroyed == 0, "still there");
    guest_free(&g);
    CHECK(destroyed == 2, "destroyed once each: %u", destroyed);
}

/* ---- a server ---------------------------------------------------------------------------------------------------- */

static unsigned entries(const char *path)
{
    DIR *dir = opendir(path);
    unsigned n = 0;

    CHECK(dir, "%s", path);
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static int client(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0, "%s: %s", path, strerror(errno));
    return fd;
}

/* Reads until `part` came. */
static void hears(int fd, const char *part)
{
    static char buf[1 << 16];
    size_t have = 0;

    for (buf[0] = 0; !strstr(buf, part); buf[have] = 0) {
        ssize_t n = read(fd, buf + have, sizeof buf - 1 - have);
        CHECK(n > 0, "the server hung up before '%s': %s", part, buf);
        have += (size_t)n;
    }
}

static void tells(int fd, const char *text)
{
    CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "%s", text);
}

static void serve(const char *path)
{
    char uri[256];
    struct stat st;

    snprintf(uri, sizeof uri, "unix:%s", path);
    umask(0);
    CHECK(vmig_qmp_listen(g.m, uri) == 0 && stat(path, &st) == 0, "%s", uri);
    CHECK((st.st_mode & 0777) == 0600, "for its owner only: %o", st.st_mode);
    CHECK(vmig_qmp_listen(g.m, uri) == -EADDRINUSE, "taken");
    CHECK(vmig_qmp_listen(g.m, "tcp:127.0.0.1:0") == 0, "tcp");
}

static void case_leaves_nothing(const char *path)
{
    unsigned tasks = entries("/proc/self/task"), fds;
    int held[3];
    char *at;

    guest_free(&g);
    fds = entries("/proc/self/fd");
    for (unsigned round = 0; round < 20; round++) {
        guest_new(&g, NULL, 3);
        serve(path);
        at = vmig_get(g.m, "qmp-address");
        CHECK(at && strncmp(at, "tcp:127.0.0.1:", 14) == 0 && strcmp(at + 14, "0") != 0, "%s", at);
        vmig_string_free(at);
        for (unsigned i = 0; i < 3; i++)
            held[i] = client(path);
        tells(held[0], "{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-status\"}{\"execute\": \"stop\"}");
        hears(held[0], "STOP");
        tells(held[1], "{\"execute\": \"qmp_cap");
        guest_free(&g);                 /* with clients connected, one in the middle of a word */
        hears(held[2], "QMP");
        CHECK(access(path, F_OK) < 0, "the socket's file is gone");
        for (unsigned i = 0; i < 3; i++)
            close(held[i]);
        CHECK(entries("/proc/self/fd") == fds, "round %u: %u descriptors, %u before", round, entries("/proc/self/fd"), fds);
        CHECK(entries("/proc/self/task") <= tasks, "round %u: threads", round);
    }
    guest_new(&g, NULL, 3);
}

static int free_it(void *opaque, const char *arguments, vmig_reply *reply)
{
    (void)opaque, (void)arguments, (void)reply;
    vmig_free(g.m);
    CHECK(strstr(vmig_errmsg(), "cannot free the guest"), "%s", vmig_errmsg());
    return vmig_get_stop_reasons(g.m);  /* it lives */
}

static void case_inside(const char *path)
{
    int fd;

    CHECK(vmig_qmp_add(g.m, "free-it", free_it, NULL, NULL) == 0, "free-it");
    serve(path);
    fd = client(path);
    tells(fd, "{\"execute\": \"qmp_capabilities\"}{\"execute\": \"free-it\", \"id\": 5}");
    hears(fd, "{\"id\":5,\"return\":{}}");
    close(fd);
}

/* A command that waits for as long as the other end of a pipe likes. */
static int nap_pipe[2];
static int nap(void *opaque, const char *arguments, vmig_reply *reply)
{
    char byte;

    (void)opaque, (void)arguments, (void)reply;
    return read(nap_pipe[0], &byte, 1) == 1 ? 0 : -EIO;
}

/* Out of band is answered while an earlier command still runs, of that client and of another; the rest waits its turn. */
static void case_oob(const char *path)
{
    int fd, other;

    CHECK(pipe2(nap_pipe, O_CLOEXEC) == 0 && vmig_qmp_add(g.m, "nap", nap, NULL, NULL) == 0, "nap");
    serve(path);
    fd = client(path), other = client(path);
    tells(fd, "{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}");
    tells(fd, "{\"execute\": \"nap\", \"id\": 1}{\"execute\": \"query-status\", \"id\": 2}");
    tells(fd, "{\"exec-oob\": \"migrate-pause\", \"id\": 3}");
    hears(fd, "\"id\":3");
    tells(other, "{\"execute\": \"query-status\"}");
    hears(other, "Expecting capabilities negotiation");
    CHECK(write(nap_pipe[1], "x", 1) == 1, "wake up");
    hears(fd, "{\"id\":1,\"return\":{}}\r\n{\"id\":2,\"return\":{\"running\":true");
    close(fd), close(other), close(nap_pipe[0]), close(nap_pipe[1]);
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "", *path = argc > 2 ? argv[2] : "";

    guest_new(&g, NULL, 3);
    if (strcmp(name, "strings") == 0)
        case_strings();
    else if (strcmp(name, "commands") == 0)
        case_commands(), guest_new(&g, NULL, 3);
    else if (strcmp(name, "leaves-nothing") == 0)
        case_leaves_nothing(path);
    else if (strcmp(name, "inside") == 0)
        case_inside(path);
    else if (strcmp(name, "oob") == 0)
        case_oob(path);
    else
        CHECK(false, "no case '%s'", name);
    guest_free(&g);
    printf("%s done\n", name);
    return 0;
}
