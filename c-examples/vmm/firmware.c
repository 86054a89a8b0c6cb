/* A machine that boots a firmware image instead of the built-in guest.                  SPDX: MIT OR Apache-2.0
 *
 * One vCPU in its reset state; the image lies below 4 GiB, where the reset vector is, and below 1 MiB, where it runs;
 * all RAM is in one block below the PCI hole. */
#include "vmm.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>

int firmware_read(struct firmware *firmware, const char *path)
{
    FILE *file = fopen(path, "re");
    int err = 0;

    if (!file)
        return -errno;
    firmware->len = fread(firmware->bytes, 1, sizeof firmware->bytes, file);
    if (ferror(file) || fgetc(file) != EOF || firmware->len == 0 || firmware->len % GUEST_PAGE != 0)
        err = -EFBIG;
    fclose(file);
    return err;
}

void firmware_blocks(struct machine *vm, const struct machine_config *config)
{
    uint64_t len = config->firmware->len;

    vm->ram[0] = (struct ram_block){ .name = "ram.low", .len = config->mem_bytes, .gpa = 0, .slot = 0, .fd = -1 };
    vm->ram[1] = (struct ram_block){ .name = "firmware", .len = len, .gpa = FIRMWARE_END - len, .slot = 1, .fd = -1 };
}

/* KVM makes the first vCPU ready to run from its reset vector, so there is nothing to set. */
void firmware_boot(struct machine *vm, const struct firmware *firmware)
{
    memcpy(machine_host(vm, FIRMWARE_LOW_END - firmware->len), firmware->bytes, firmware->len);
    memcpy(vm->ram[1].host, firmware->bytes, firmware->len);
}
