/* Uses every macro of vmig.h, in C and in C++. Compiled by tests/header.rs, twice into one program with different UNIT,
 * so that the header is also seen to define nothing. */
#include <vmig.h>
#include <vmig.h>

struct sized { size_t size; int more; };

int UNIT(void);
int UNIT(void)
{
    struct sized here = VMIG_SIZED(struct sized);
    static struct sized there = VMIG_SIZED(struct sized);
    return here.size == sizeof(here) && here.more == 0 && there.size == sizeof(there) && there.more == 0 ? 0 : 1;
}
