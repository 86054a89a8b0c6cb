/* What a command of `exec:` may be: passes its standard input on to a unix socket, and what comes back to its standard
 * output, until both have ended.                                                        SPDX: MIT OR Apache-2.0
 *
 *   bridge PATH      connects      bridge -l PATH   lets one in */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int fail(const char *what)
{
    fprintf(stderr, "bridge: %s: %s\n", what, strerror(errno));
    return 1;
}

/* Whoever sees the name can connect: it appears when we listen. */
static int let_in(struct sockaddr_un *at, const char *path)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), link;

    snprintf(at->sun_path, sizeof at->sun_path, "%s.new", path);
    if (fd < 0 || bind(fd, (struct sockaddr *)at, sizeof *at) < 0 || listen(fd, 4) < 0 || rename(at->sun_path, path) < 0)
        return -1;
    /* One who is waited for by nobody any more ends with his standard input. */
    struct pollfd polled[] = { { .fd = fd, .events = POLLIN }, { .fd = 0, .events = 0 }, { .fd = 1, .events = 0 } };
    if (poll(polled, 3, -1) < 0 || !(polled[0].revents & POLLIN))
        link = -1;
    else
        link = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
    close(fd);
    return link;
}

/* Some bytes; 0: the end, -1: an error. */
static ssize_t pass(int from, int to)
{
    char buf[65536];
    ssize_t got = read(from, buf, sizeof buf), n;

    for (ssize_t at = 0; at < got; at += n)
        if ((n = write(to, buf + at, (size_t)(got - at))) < 0)
            return -1;
    return got;
}

int main(int argc, char **argv)
{
    struct sockaddr_un at = { .sun_family = AF_UNIX };
    int link;

    if (argc == 3 && strcmp(argv[1], "-l") == 0) {
        if ((link = let_in(&at, argv[2])) < 0)
            return fail(argv[2]);
    } else if (argc == 2) {
        snprintf(at.sun_path, sizeof at.sun_path, "%s", argv[1]);
        link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (link < 0 || connect(link, (struct sockaddr *)&at, sizeof at) < 0)
            return fail(argv[1]);
    } else {
        fprintf(stderr, "bridge [-l] PATH\n");
        return 2;
    }
    struct pollfd polled[] = { { .fd = 0, .events = POLLIN }, { .fd = link, .events = POLLIN } };
    while (polled[0].fd >= 0 || polled[1].fd >= 0) {
        ssize_t there = 1, back = 1;
        if (poll(polled, 2, -1) < 0)
            return fail("poll");
        if (polled[0].revents && (there = pass(0, link)) == 0)
            polled[0].fd = -1, shutdown(link, SHUT_WR);
        if (polled[1].revents && (back = pass(link, 1)) == 0)
            polled[1].fd = -1, close(1);
        if (there < 0 || back < 0)
            return fail("passing bytes on");
    }
    return 0;
}
