/* Compares the page hashes of two processes.                                            SPDX: MIT OR Apache-2.0 */
#define _GNU_SOURCE
#include "hashfile.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int read_block(FILE *file, struct hash_block *head, uint64_t **hashes)
{
    *hashes = NULL;
    if (fread(head, sizeof *head, 1, file) != 1 || head->pages > 1ull << 32)
        return -1;
    head->name[sizeof head->name - 1] = '\0';
    *hashes = malloc(head->pages * sizeof **hashes);
    return *hashes && fread(*hashes, sizeof **hashes, head->pages, file) == head->pages ? 0 : -1;
}

static int compare_blocks(FILE *a, FILE *b, hash_difference *each, uint64_t *pages, uint64_t *different)
{
    struct hash_block left, right;
    uint64_t *ours = NULL, *theirs = NULL;
    int err = -1;

    if (read_block(a, &left, &ours) == 0 && read_block(b, &right, &theirs) == 0 &&
        strcmp(left.name, right.name) == 0 && left.gpa == right.gpa && left.pages == right.pages) {
        err = 0;
        *pages += left.pages;
        for (uint64_t i = 0; i < left.pages; i++)
            if (ours[i] != theirs[i]) {
                ++*different;
                each(left.name, left.gpa + i * 4096, i * 4096);
            }
    }
    free(ours);
    free(theirs);
    return err;
}

int hash_compare(const char *left, const char *right, hash_difference *each, uint64_t *pages, uint64_t *different)
{
    FILE *a = fopen(left, "rbe"), *b = fopen(right, "rbe");
    struct hash_head ours, theirs;
    int err = -1;

    *pages = *different = 0;
    if (a && b && fread(&ours, sizeof ours, 1, a) == 1 && fread(&theirs, sizeof theirs, 1, b) == 1 &&
        memcmp(ours.magic, HASH_MAGIC, sizeof ours.magic) == 0 && memcmp(&ours, &theirs, sizeof ours) == 0 &&
        ours.blocks <= HASH_MAX_BLOCKS) {
        err = 0;
        for (uint64_t i = 0; i < ours.blocks && err == 0; i++)
            err = compare_blocks(a, b, each, pages, different);
    }
    if (a)
        fclose(a);
    if (b)
        fclose(b);
    return err;
}
