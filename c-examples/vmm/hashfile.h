/* A file with one 64-bit hash per guest page: how two processes compare all of their RAM. SPDX: MIT OR Apache-2.0
 *
 * struct hash_head, then per block a struct hash_block followed by its hashes; host byte order. */
#ifndef HASHFILE_H
#define HASHFILE_H
#include <stdint.h>

#define HASH_MAGIC "PAGEHSH1"
enum { HASH_MAX_BLOCKS = 16 };
struct hash_head {
    char magic[8];
    uint64_t blocks;
};
struct hash_block {
    char name[32];
    uint64_t gpa, pages;
};

typedef void hash_difference(const char *block, uint64_t gpa, uint64_t offset);

/* Calls each() for every page that differs; -1 when the files are not of the same blocks or not readable. */
int hash_compare(const char *left, const char *right, hash_difference *each, uint64_t *pages, uint64_t *different);
#endif
