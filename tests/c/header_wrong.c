/* What must not compile: tests/header.rs builds it with CASE=0, which must succeed, and then once for each number below,
 * which must fail. Each case is the good line with one thing wrong. */
#include <vmig.h>

struct sized { size_t size; int more; };
struct unsized_ { int more; };

void wrong(void);
void wrong(void)
{
#if CASE == 1
    struct unsized_ s = VMIG_SIZED(struct unsized_); /* no size member */
#else
    struct sized s = VMIG_SIZED(struct sized);
#endif
    (void)s;
}
