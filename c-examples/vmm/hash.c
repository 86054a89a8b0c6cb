/* Hashes of all guest pages, written to a file; several threads, as it runs while a guest is stopped.
 *                                                                                       SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "hashfile.h"
#include "vmm.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_THREADS = 4 };

static uint64_t rotate(uint64_t value, unsigned by)
{
    return value << by | value >> (64 - by);
}

/* Four independent lanes, or the multiplications would wait for each other. */
static uint64_t hash_page(const uint64_t *page)
{
    const uint64_t odd = 0x9e3779b97f4a7c15;
    uint64_t lane[4] = { 1, 2, 3, 4 }, hash = 0;

    for (size_t i = 0; i < GUEST_PAGE / 8; i += 4)
        for (size_t j = 0; j < 4; j++)
            lane[j] = rotate((lane[j] ^ page[i + j]) * odd, 29);
    for (size_t j = 0; j < 4; j++)
        hash = rotate((hash ^ lane[j]) * odd, 31);
    return hash;
}

struct share {
    const uint8_t *host;
    uint64_t *hashes, pages;
    pthread_t thread;
};

static void *hash_share(void *opaque)
{
    struct share *share = opaque;

    for (uint64_t i = 0; i < share->pages; i++)
        share->hashes[i] = hash_page((const uint64_t *)(const void *)(share->host + i * GUEST_PAGE));
    return NULL;
}

static void hash_block(const struct ram_block *ram, uint64_t *hashes)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint64_t n = cores < 1 ? 1 : cores < MAX_THREADS ? (uint64_t)cores : MAX_THREADS, pages = ram->len / GUEST_PAGE;
    struct share share[MAX_THREADS];
    uint64_t started = 0, first = 0;

    for (uint64_t i = 0; i < n; i++) {
        uint64_t end = pages * (i + 1) / n;
        share[i] = (struct share){ .host = ram->host + first * GUEST_PAGE, .hashes = hashes + first,
                                   .pages = end - first };
        first = end;
    }
    while (started + 1 < n && pthread_create(&share[started].thread, NULL, hash_share, &share[started]) == 0)
        started++;
    for (uint64_t i = started; i < n; i++)
        hash_share(&share[i]);
    for (uint64_t i = 0; i < started; i++)
        pthread_join(share[i].thread, NULL);
}

static bool write_block(FILE *file, const struct ram_block *ram)
{
    struct hash_block head = { .gpa = ram->gpa, .pages = ram->len / GUEST_PAGE };
    uint64_t *hashes = malloc(head.pages * sizeof *hashes);
    bool ok = false;

    snprintf(head.name, sizeof head.name, "%s", ram->name);
    if (hashes) {
        hash_block(ram, hashes);
        ok = fwrite(&head, sizeof head, 1, file) == 1 && fwrite(hashes, sizeof *hashes, head.pages, file) == head.pages;
    }
    free(hashes);
    return ok;
}

int hash_write(const struct machine *vm, const char *path)
{
    struct hash_head head = { .magic = HASH_MAGIC, .blocks = RAM_BLOCKS };
    FILE *file = fopen(path, "wbe");
    bool ok;

    if (!file)
        return -errno;
    ok = fwrite(&head, sizeof head, 1, file) == 1;
    for (size_t i = 0; i < RAM_BLOCKS && ok; i++)
        ok = write_block(file, &vm->ram[i]);
    return fclose(file) == 0 && ok ? 0 : -EIO;
}
