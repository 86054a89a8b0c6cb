/* A VMM with 64 GiB of RAM of which 1 GiB is in use, for tests of what a migration costs in memory.
 *                                                                                       SPDX: MIT OR Apache-2.0
 *   sparse KIND PATTERN [incoming]      KIND: private (anonymous memory) or shared (a memfd)
 *
 * Each page in use has contents of its own; a destination has other ones here and there. Commands beside those of program.h: "check" says whether memory is what it
 * ought to be, "memory" what the process uses, in KiB. */
#include "program.h"
#include <fcntl.h>
#include <sys/stat.h>

#define RAM_PAGES (UINT64_C(64) << 18)
#define USED_PAGES (UINT64_C(1) << 18)
enum { PAGE = 4096, WORDS = PAGE / 8, GRANULE = 512, CHUNK = 8192, LITTER = 2000 };

struct machine {
    vmig *m;
    uint64_t *ram;
    int fd;                     /* of shared memory; else -1 */
    uint64_t *used;             /* a bit per page */
    uint64_t in_use;
};

/* ---- which pages are in use ---- */

static uint64_t mixed(uint64_t n)
{
    n = (n ^ n >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    n = (n ^ n >> 27) * UINT64_C(0x94d049bb133111eb);
    return n ^ n >> 31;
}

static bool is_used(const struct machine *vm, uint64_t page)
{
    return vm->used[page / 64] >> page % 64 & 1;
}

static void use(struct machine *vm, uint64_t page)
{
    if (page < RAM_PAGES && vm->in_use < USED_PAGES && !is_used(vm, page)) {
        vm->used[page / 64] |= UINT64_C(1) << page % 64;
        vm->in_use++;
    }
}

/* `pages` of a granule, the first ones or spread out. */
static void use_granule(struct machine *vm, uint64_t granule, uint64_t pages, bool spread)
{
    for (uint64_t n = 0; n < pages; n++)
        use(vm, granule * GRANULE + (spread ? n * GRANULE / pages : n));
}

static bool choose(struct machine *vm, const char *pattern)
{
    const uint64_t granules = RAM_PAGES / GRANULE, start = 12345;

    for (uint64_t n = 0; vm->in_use < USED_PAGES; n++) {
        uint64_t any = mixed(n + 1) % granules;
        if (strcmp(pattern, "dense") == 0)              /* in one piece */
            use(vm, start + n);
        else if (strcmp(pattern, "single") == 0)        /* pages anywhere */
            use(vm, mixed(n) % RAM_PAGES);
        else if (strcmp(pattern, "nth") == 0)           /* every 64th page */
            use(vm, n * 64 + 7);
        else if (strcmp(pattern, "apart") == 0)         /* every 16th granule, full */
            use_granule(vm, n * 16 + 3, GRANULE, false);
        else if (strcmp(pattern, "pairs") == 0)         /* two full granules, then 30 empty ones */
            use_granule(vm, n / 2 * 32 + n % 2, GRANULE, false);
        else if (strcmp(pattern, "half") == 0)          /* granules in a row, the first half of each */
            use_granule(vm, 100 + n, GRANULE / 2, false);
        else if (strcmp(pattern, "half-spread") == 0)   /* granules in a row, every other page */
            use_granule(vm, 100 + n, GRANULE / 2, true);
        else if (strcmp(pattern, "mixed") == 0)         /* granules anywhere, between a half and full */
            use_granule(vm, any, GRANULE / 2 + n % (GRANULE / 2), n % 3 == 0);
        else if (strcmp(pattern, "little") == 0)        /* granules anywhere, up to a half */
            use_granule(vm, any, 1 + n % (GRANULE / 2), n % 3 == 0);
        else
            return false;
    }
    return true;
}

static uint64_t content(uint64_t page, uint64_t word)
{
    return mixed(page * WORDS + word) | 1;
}

static void fill(struct machine *vm)
{
    for (uint64_t page = 0; page < RAM_PAGES; page++)
        for (uint64_t word = 0; is_used(vm, page) && word < WORDS; word++)
            vm->ram[page * WORDS + word] = content(page, word);
}

/* What was there before a guest arrives: pages all over the place that have to become something else, or zero. */
static void litter(struct machine *vm)
{
    for (uint64_t n = 0; n < LITTER; n++)
        memset(vm->ram + mixed(n) % RAM_PAGES * WORDS, 0xa5, PAGE);
}

/* ---- what there is ---- */

/* Reading a page that is not there may make it, so only those that are there are looked at. */
static bool is_right(const struct machine *vm, uint64_t page)
{
    for (uint64_t word = 0; word < WORDS; word++)
        if (vm->ram[page * WORDS + word] != (is_used(vm, page) ? content(page, word) : 0))
            return false;
    return true;
}

/* The pages from `first` on that our page tables have: those of shared memory are there because we wrote them. */
static uint64_t wrong_in_tables(const struct machine *vm, int pagemap, uint64_t first)
{
    static uint64_t entries[CHUNK];
    const uint64_t at = (uintptr_t)vm->ram / PAGE + first, there = UINT64_C(3) << 62, protected = 1ull << 57;

    if (pread(pagemap, entries, sizeof entries, (off_t)(at * 8)) != (ssize_t)sizeof entries) {
        perror("/proc/self/pagemap");
        exit(1);
    }
    for (uint64_t n = 0; n < CHUNK; n++) {
        /* Write protection marks pages that are in no table: such an entry is no page, unless it stands for one in use. */
        bool mark = (entries[n] & (there | protected)) == (1ull << 62 | protected) && !is_used(vm, first + n);
        if (entries[n] & there && !mark ? !is_right(vm, first + n) : is_used(vm, first + n))
            return first + n;
    }
    return RAM_PAGES;
}

static void answer_check(const struct machine *vm)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t wrong = RAM_PAGES;

    for (uint64_t first = 0; first < RAM_PAGES && wrong == RAM_PAGES; first += CHUNK)
        wrong = wrong_in_tables(vm, pagemap, first);
    close(pagemap);
    if (wrong < RAM_PAGES)
        printf("value page %" PRIu64 " is wrong\n", wrong);
    else
        printf("value right\n");
}

/* Resident now and at most, page tables, and what a shared file holds. */
static void answer_memory(const struct machine *vm)
{
    unsigned long high = 0, now = 0, tables = 0;
    struct stat file = { .st_blocks = 0 };
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");

    while (status && fgets(line, sizeof line, status)) {
        sscanf(line, "VmHWM: %lu", &high);
        sscanf(line, "VmRSS: %lu", &now);
        sscanf(line, "VmPTE: %lu", &tables);
    }
    if (status)
        fclose(status);
    if (vm->fd >= 0)
        fstat(vm->fd, &file);
    printf("value high=%lu now=%lu tables=%lu file=%" PRIu64 "\n", high, now, tables, (uint64_t)file.st_blocks / 2);
}

static bool own_command(void *opaque, const char *verb, char *rest)
{
    const struct machine *vm = opaque;

    (void)rest;
    if (strcmp(verb, "check") == 0)
        answer_check(vm);
    else if (strcmp(verb, "memory") == 0)
        answer_memory(vm);
    else
        return false;
    return true;
}

/* ---- the machine ---- */

static int nothing(void *vm)
{
    (void)vm;                   /* no vCPU runs */
    return 0;
}

static void map(struct machine *vm, bool shared)
{
    int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;

    vm->fd = shared ? memfd_create("ram", MFD_CLOEXEC) : -1;
    if (shared && (vm->fd < 0 || ftruncate(vm->fd, (off_t)(RAM_PAGES * PAGE)) < 0)) {
        perror("memfd");
        exit(1);
    }
    vm->ram = mmap(NULL, RAM_PAGES * PAGE, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, vm->fd, 0);
    vm->used = calloc(RAM_PAGES / 64, sizeof *vm->used);
    if (vm->ram == MAP_FAILED || !vm->used) {
        perror("mmap");
        exit(1);
    }
}

int main(int argc, char **argv)
{
    static struct machine vm;
    vmig_ops ops = VMIG_SIZED(vmig_ops);
    vmig_ram ram = VMIG_SIZED(vmig_ram);

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 3)
        return 2;
    map(&vm, strcmp(argv[1], "shared") == 0);
    if (!choose(&vm, argv[2]))
        return 2;
    if (argc == 3) {
        /* The guest's own writes shall cost no more than they are, on any machine. */
        (void)madvise(vm.ram, RAM_PAGES * PAGE, MADV_NOHUGEPAGE);
        fill(&vm);
    } else {
        litter(&vm);
    }
    ops.stop = nothing, ops.start = nothing;
    need(vmig_new(&ops, &vm, &vm.m), "vmig_new");
    ram.name = "ram", ram.host = vm.ram, ram.len = RAM_PAGES * PAGE, ram.flags = VMIG_RAM_MARKED;
    vmig_bql_lock(vm.m);
    need(vmig_add_ram(vm.m, &ram), "vmig_add_ram");
    vmig_bql_unlock(vm.m);
    if (argc == 3)
        need(vmig_start(vm.m), "vmig_start");
    printf("ready\n");
    serve(vm.m, own_command, &vm);
    vmig_free(vm.m);
    return 0;
}
