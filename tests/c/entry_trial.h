/* Chapter of entry.c: what vmig_test_device refuses. */

static int test_named(const char *name) { return vmig_test_device(m, name, 0, NULL); }

static void tests(void)
{
    vmig_device_test how = VMIG_SIZED(vmig_device_test);

    CASE(vmig_test_device);
    STRINGS("name", test_named);
    REFUSES(EINVAL, "handle", vmig_test_device(NULL, "x", 0, NULL));
    REFUSES(ENOENT, "no device or section 'nobody' with instance 3", vmig_test_device(m, "nobody", 3, NULL));
    how.flags = 128;
    REFUSES(EINVAL, "flags", vmig_test_device(m, "nobody", 0, &how));
    how.size = 0;
    REFUSES(EINVAL, "VMIG_SIZED(vmig_device_test)", vmig_test_device(m, "nobody", 0, &how));
    how.size = 12;
    REFUSES(EINVAL, "vmig_device_test", vmig_test_device(m, "nobody", 0, &how));
    how.size = 8192;
    REFUSES(E2BIG, "vmig_device_test", vmig_test_device(m, "nobody", 0, &how));
    how.size = sizeof how.size;         /* an older program, which has no flags yet */
    REFUSES(ENOENT, "nobody", vmig_test_device(m, "nobody", 0, &how));
}
