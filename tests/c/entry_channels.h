/* Chapter of entry.c: what vmig_add_channel refuses. */

static const vmig_channel_ops *good_channel;

static int channel_connect(void *opaque, const char *address, int timeout_ms, void **conn)
{
    (void)opaque, (void)address, (void)timeout_ms, (void)conn;
    return -ECONNREFUSED;
}

static int channel_listen(void *opaque, const char *address, void **listener)
{
    (void)opaque, (void)address, (void)listener;
    return -EADDRINUSE;
}

static int64_t channel_read(void *opaque, void *conn, void *buf, size_t len, int timeout_ms)
{
    (void)opaque, (void)conn, (void)buf, (void)len, (void)timeout_ms;
    return 0;
}

static int64_t channel_write(void *opaque, void *conn, const void *buf, size_t len, int timeout_ms)
{
    (void)opaque, (void)conn, (void)buf, (void)len, (void)timeout_ms;
    return -EPIPE;
}

static void channel_shutdown(void *opaque, void *conn, int how)
{
    (void)opaque, (void)conn, (void)how;
}

static void channel_close(void *opaque, void *conn)
{
    (void)opaque, (void)conn;
}

static int channel_of(void *ops) { return vmig_add_channel(m, "tcp", ops, &word, count_gone); }
static int channel_named(const char *name) { return vmig_add_channel(m, name, good_channel, &word, count_gone); }

static void channels(void)
{
    vmig_channel_ops ops = VMIG_SIZED(vmig_channel_ops), bad;

    CASE(vmig_add_channel);
    ops.connect = channel_connect, ops.read = channel_read, ops.write = channel_write;
    ops.shutdown = channel_shutdown, ops.close = channel_close, good_channel = &ops;
    gone = 0;
    REFUSES(EINVAL, "handle", vmig_add_channel(NULL, "new", &ops, &word, count_gone));
    REFUSES(EINVAL, "vmig_channel_ops", channel_of(NULL));
    REFUSES(EEXIST, "'tcp'", channel_of(&ops));
    STRINGS("scheme", channel_named);
    REFUSES(EINVAL, "up to 32 small letters", channel_named("A"));
    REFUSES(EINVAL, "up to 32 small letters", channel_named("a:b"));
    REFUSES(EINVAL, "up to 32 small letters", channel_named("abcdefghijklmnopqrstuvwxyz0123456"));
    bad = ops, bad.size = 8;
    REFUSES(EINVAL, "vmig_channel_ops", channel_of(&bad));
    bad = ops, bad.read = NULL;
    REFUSES(EINVAL, "read", channel_of(&bad));
    bad = ops, bad.write = NULL;
    REFUSES(EINVAL, "write", channel_of(&bad));
    bad = ops, bad.shutdown = NULL;
    REFUSES(EINVAL, "shutdown", channel_of(&bad));
    bad = ops, bad.close = NULL;
    REFUSES(EINVAL, "close", channel_of(&bad));
    bad = ops, bad.connect = NULL;
    REFUSES(EINVAL, "connect", channel_of(&bad));
    bad = ops, bad.listen = channel_listen;
    REFUSES(EINVAL, "listen and accept", channel_of(&bad));
    bad = ops, bad.flags = 128;
    REFUSES(EINVAL, "flags", channel_of(&bad));
    bad = ops, bad.reserved = 1;
    REFUSES(EINVAL, "reserved", channel_of(&bad));
    CHECK(gone == 0, "nothing was destroyed that was not added");
}
