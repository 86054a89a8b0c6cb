/* Dirty sources of tracked.c: bitmaps handed over, and everything that can go wrong with that.
 *                                                                                       SPDX: MIT OR Apache-2.0 */
static int source_start(void *opaque)
{
    struct machine *vm = opaque;

    if (vm->fail_start && --vm->fail_start == 0)
        return -ENXIO;
    vm->starts++;
    return 0;
}

static void source_stop(void *opaque)
{
    ((struct machine *)opaque)->stops++;
}

static int source_sync(void *opaque, const vmig_dirty_bitmap *map)
{
    struct machine *vm = opaque;
    bool ram = strcmp(map->ram, "ram") == 0;

    vm->syncs++;
    if (vm->fail_sync && --vm->fail_sync == 0)
        return -EIO;
    if (vm->lie && --vm->lie == 0)
        map->bits[map->pages / 64] |= 1ull << 63;
    if (vm->edge && --vm->edge == 0)
        map->bits[map->pages / 64] |= 1ull << map->pages % 64;
    for (uint64_t i = 0; ram && i < map->pages / 64; i++)
        map->bits[i] |= atomic_exchange(&vm->bits[i], 0);
    return 0;
}

/* With `clear` what was told stays until it is cleared. */
static int source_look(void *opaque, const vmig_dirty_bitmap *map)
{
    struct machine *vm = opaque;
    bool ram = strcmp(map->ram, "ram") == 0;

    vm->syncs++;
    for (uint64_t i = 0; ram && i < map->pages / 64; i++)
        map->bits[i] |= vm->bits[i];
    return 0;
}

static int source_clear(void *opaque, const vmig_dirty_bitmap *map)
{
    struct machine *vm = opaque;
    bool ram = strcmp(map->ram, "ram") == 0;

    vm->clears++;
    if (vm->fail_clear && --vm->fail_clear == 0)
        return -EDOM;
    for (uint64_t i = 0; ram && i < map->pages; i++)
        if (map->bits[i / 64] >> i % 64 & 1)
            atomic_fetch_and(&vm->bits[(map->first + i) / 64], ~(1ull << (map->first + i) % 64));
    return 0;
}

static int add_source(struct machine *vm, uint32_t flags, bool clear)
{
    vmig_dirty_source source = VMIG_SIZED(vmig_dirty_source);

    source.name = "device's", source.flags = flags;
    source.start = source_start, source.stop = source_stop;
    source.sync = clear ? source_look : source_sync;
    source.clear = clear ? source_clear : NULL;
    return vmig_add_dirty_source(vm->m, &source, vm);
}

static bool source_command(struct machine *vm, const char *verb, char *rest)
{
    static const char *const faults[] = { "fail-start", "fail-sync", "fail-clear", "lie", "edge" };
    _Atomic int *const counts[] = { &vm->fail_start, &vm->fail_sync, &vm->fail_clear, &vm->lie, &vm->edge };

    for (int i = 0; i < 5; i++) {
        if (rest && strcmp(verb, faults[i]) == 0) {
            *counts[i] = atoi(rest);
            printf("ok\n");
            return true;
        }
    }
    if (strcmp(verb, "calls") == 0)
        printf("calls starts=%d stops=%d syncs=%d clears=%d\n", vm->starts, vm->stops, vm->syncs, vm->clears);
    else if (strcmp(verb, "add-source") == 0 || strcmp(verb, "remove-source") == 0) {
        vmig_bql_lock(vm->m);
        answer(verb, *verb == 'a' ? add_source(vm, 0, false) : vmig_remove_dirty_source(vm->m, vm));
        vmig_bql_unlock(vm->m);
    } else
        return false;
    return true;
}
