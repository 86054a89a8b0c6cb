/* A row of vmig_device_test.transient, and the last one. */
#define VMIG_MEMBER(type, member) { offsetof(type, member), sizeof(((type *)0)->member) }
#define VMIG_MEMBER_END { 0, 0 }
