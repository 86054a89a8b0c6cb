/* Chapters of entry.c: what is refused before a migration and by what starts, steers and watches one. */

static int outgoing(const char *uri) { return vmig_outgoing(m, uri); }
static int incoming(const char *uri) { return vmig_incoming(m, uri); }
static int resume(const char *uri) { return vmig_resume(m, uri); }
static int check(const char *uri) { return vmig_check(m, uri, NULL, NULL); }
static int set_name(const char *name) { return vmig_set(m, name, "1"); }
static int set_value(const char *value) { return vmig_set(m, "max-bandwidth", value); }
static int status_of(void *p) { return vmig_get_status(m, p); }
static int event_of(void *p) { return vmig_next_event(m, p); }

static int downtime_of(void *p) { return vmig_get_downtime(m, p); }
static int expected_of(void *p) { return vmig_get_expected_downtime(m, p); }

static char long_config[(1 << 20) + 1];

static int rate_of(void *p) { return vmig_get_dirty_rate(m, p, NULL); }
static int forecast_of(void *p) { return vmig_forecast(m, 1, p, NULL); }

static void before_migrating(void)
{
    vmig_dirty_rate r = VMIG_SIZED(vmig_dirty_rate);
    vmig_forecast_report f = VMIG_SIZED(vmig_forecast_report);
    char *why = (char *)&r;
    uint64_t rates[2] = { 7, 7 };

    CASE(vmig_measure_dirty_rate), CASE(vmig_get_dirty_rate), CASE(vmig_get_vcpu_dirty_rates), CASE(vmig_forecast);
    REFUSES(EINVAL, "handle", vmig_measure_dirty_rate(NULL, VMIG_RATE_SAMPLING, 100, 0));
    REFUSES(EINVAL, "mode 3", vmig_measure_dirty_rate(m, 3, 100, 0));
    for (uint32_t mode = VMIG_RATE_SAMPLING; mode <= VMIG_RATE_RING; mode++)
        for (unsigned i = 0; i < 4; i++) {
            uint64_t wrong[] = { 0, 49, 60001, UINT64_MAX };
            REFUSES(EINVAL, "for 50 to 60000 ms", vmig_measure_dirty_rate(m, mode, wrong[i], 0));
        }
    REFUSES(EINVAL, "128 to 16384 pages", vmig_measure_dirty_rate(m, VMIG_RATE_SAMPLING, 100, 127));
    REFUSES(EINVAL, "128 to 16384 pages", vmig_measure_dirty_rate(m, VMIG_RATE_SAMPLING, 100, UINT64_MAX));
    REFUSES(EINVAL, "page-sampling only", vmig_measure_dirty_rate(m, VMIG_RATE_BITMAP, 100, 512));
    REFUSES(EINVAL, "KVM_CAP_DIRTY_LOG_RING", vmig_measure_dirty_rate(m, VMIG_RATE_RING, 100, 0));
    CHECK(vmig_set(m, "dirty-tracker", "none") == 0, "no tracker");
    REFUSES(EINVAL, "only be sampled", vmig_measure_dirty_rate(m, VMIG_RATE_BITMAP, 100, 0));
    CHECK(vmig_set(m, "dirty-tracker", "auto") == 0, "any tracker");
    REFUSES(EINVAL, "handle", vmig_get_dirty_rate(NULL, &r, NULL));
    sizes("vmig_dirty_rate", rate_of, &r, sizeof r, 8, true);
    CHECK(vmig_get_dirty_rate(m, &r, &why) == 0 && !why && r.state == VMIG_RATE_NONE, "nothing was measured");
    REFUSES(EINVAL, "handle", vmig_get_vcpu_dirty_rates(NULL, rates, 2));
    REFUSES(EINVAL, "rates is NULL", vmig_get_vcpu_dirty_rates(m, NULL, 2));
    CHECK(vmig_get_vcpu_dirty_rates(m, rates, 2) == 0 && rates[0] == 7, "no vCPUs");
    REFUSES(EINVAL, "handle", vmig_forecast(NULL, 1, &f, NULL));
    sizes("vmig_forecast_report", forecast_of, &f, sizeof f, 8, true);
    CHECK(vmig_forecast(m, 1, &f, &why) == 0 && f.verdict == VMIG_FORECAST_UNKNOWN && strstr(why, "comes first"), "%s", why);
    vmig_string_free(why);
}

static void migrating(void)
{
    vmig_status s = VMIG_SIZED(vmig_status);
    vmig_downtime d = VMIG_SIZED(vmig_downtime);
    vmig_gate_config gate = VMIG_SIZED(vmig_gate_config);
    vmig_gate *made;

    CASE(vmig_outgoing), CASE(vmig_incoming), CASE(vmig_cancel), CASE(vmig_continue), CASE(vmig_resolve), CASE(vmig_wait);
    STRINGS("uri", outgoing);
    STRINGS("uri", incoming);
    REFUSES(EINVAL, "handle", vmig_outgoing(NULL, "tcp::1"));
    REFUSES(EINVAL, "handle", vmig_incoming(NULL, "tcp::0"));
    REFUSES(EINVAL, "protocol 'smtp'", vmig_outgoing(m, "smtp:x"));
    REFUSES(EINVAL, "handle", vmig_cancel(NULL));
    CHECK(vmig_cancel(m) == 0, "nothing to cancel is fine");
    REFUSES(EINVAL, "handle", vmig_continue(NULL));
    REFUSES(EINVAL, "pre-switchover", vmig_continue(m));
    CASE(vmig_resume);
    STRINGS("uri", resume);
    REFUSES(EINVAL, "handle", vmig_resume(NULL, "tcp::1"));
    REFUSES(EINVAL, "protocol 'smtp'", vmig_resume(m, "smtp:x"));
    REFUSES(EINVAL, "at an address", vmig_resume(m, "fd:1"));
    REFUSES(EINVAL, "at an address", vmig_resume(m, "exec:cat"));
    REFUSES(EINVAL, "at an address", vmig_resume(m, "file:x"));
    REFUSES(EINVAL, "no outgoing migration waits", vmig_resume(m, "tcp:127.0.0.1:1"));
    REFUSES(EINVAL, "handle", vmig_resolve(NULL, 0));
    REFUSES(EINVAL, "run is 2", vmig_resolve(m, 2));
    REFUSES(EINVAL, "nothing to resolve", vmig_resolve(m, 1));
    CASE(vmig_set_config), CASE(vmig_check);
    REFUSES(EINVAL, "handle", vmig_set_config(NULL, "x", 1));
    REFUSES(EINVAL, "NULL", vmig_set_config(m, NULL, 1));
    REFUSES(EINVAL, "no number of bytes", vmig_set_config(m, "x", SIZE_MAX));
    REFUSES(E2BIG, "at most 1048576 bytes", vmig_set_config(m, long_config, sizeof long_config));
    CHECK(vmig_set_config(m, NULL, 0) == 0, "no configuration");
    STRINGS("uri", check);
    REFUSES(EINVAL, "handle", vmig_check(NULL, "tcp::1", NULL, NULL));
    REFUSES(EINVAL, "protocol 'smtp'", vmig_check(m, "smtp:x", NULL, NULL));
    REFUSES(ENOTSUP, "listens at an address", vmig_check(m, "fd:1", NULL, NULL));
    REFUSES(ECONNREFUSED, "127.0.0.1", vmig_check(m, "tcp:127.0.0.1:1", NULL, NULL));
    REFUSES(EINVAL, "handle", vmig_wait(NULL, 0));
    CHECK(vmig_wait(m, -1) == 1, "nothing to wait for");
    CASE(vmig_get_status), CASE(vmig_next_event), CASE(vmig_event_fd), CASE(vmig_get_error), CASE(vmig_state_name);
    REFUSES(EINVAL, "handle", vmig_get_status(NULL, &s));
    REFUSES(EINVAL, "handle", vmig_next_event(NULL, &s));
    sizes("vmig_status", status_of, &s, sizeof s, 8, true);
    sizes("vmig_status", event_of, &s, sizeof s, 8, true);
    CASE(vmig_get_downtime), CASE(vmig_get_expected_downtime);
    REFUSES(EINVAL, "handle", vmig_get_downtime(NULL, &d));
    REFUSES(EINVAL, "handle", vmig_get_expected_downtime(NULL, &d));
    sizes("vmig_downtime", downtime_of, &d, sizeof d, 8, true);
    sizes("vmig_downtime", expected_of, &d, sizeof d, 8, true);
    REFUSES(EINVAL, "handle", vmig_event_fd(NULL));
    REFUSES_TEXT("handle", vmig_get_error(NULL));
    CHECK(vmig_get_error(m) == NULL, "there was no error yet");
    CHECK(strcmp(vmig_state_name(4711), "unknown") == 0 && strcmp(vmig_state_name(UINT32_MAX), "unknown") == 0, "state");
    CASE(vmig_dispatch), CASE(vmig_dispatch_fd);
    REFUSES(EINVAL, "handle", vmig_dispatch(NULL));
    REFUSES(EINVAL, "not manual", vmig_dispatch(m));
    REFUSES(EINVAL, "handle", vmig_dispatch_fd(NULL));
    REFUSES(EINVAL, "not manual", vmig_dispatch_fd(m));
    CASE(vmig_gate_new), CASE(vmig_gate_free), CASE(vmig_gate_enter), CASE(vmig_gate_exit), CASE(vmig_gate_close);
    CASE(vmig_gate_open), CASE(vmig_gate_throttle), CASE(vmig_gate_end);
    vmig_gate_free(NULL);
    REFUSES(EINVAL, "out is NULL", vmig_gate_new(&gate, NULL));
    REFUSES(EINVAL, "1 to 4096", vmig_gate_new(&gate, &made));
    gate.vcpus = 1, gate.flags = 2;
    REFUSES(EINVAL, "flags 0x2", vmig_gate_new(&gate, &made));
    gate.flags = 0, gate.signal = 4711;
    REFUSES(EINVAL, "signal 4711", vmig_gate_new(&gate, &made));
    REFUSES(EINVAL, "gate handle", vmig_gate_enter(NULL, 0, NULL));
    REFUSES(EINVAL, "gate handle", vmig_gate_exit(NULL, 0));
    REFUSES(EINVAL, "gate handle", vmig_gate_close(NULL));
    REFUSES(EINVAL, "gate handle", vmig_gate_open(NULL));
    REFUSES(EINVAL, "gate handle", vmig_gate_throttle(NULL, 1));
    REFUSES(EINVAL, "gate handle", vmig_gate_end(NULL));
    CASE(vmig_set), CASE(vmig_get);
    STRINGS("option", set_name);
    STRINGS("value", set_value);
    REFUSES(ENOENT, "colour", vmig_set(m, "colour", "red"));
    REFUSES(EINVAL, "max-bandwidth", set_value("-1"));
    REFUSES(EINVAL, "handle", vmig_set(NULL, "machine", "x"));
    REFUSES_TEXT("handle", vmig_get(NULL, "machine"));
    REFUSES_TEXT("option is NULL", vmig_get(m, NULL));
    REFUSES_TEXT("UTF-8", vmig_get(m, bad_utf8));
    REFUSES_TEXT("colour", vmig_get(m, "colour"));
}
