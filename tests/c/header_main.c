/* Calls both units of header_use.c. */
int unit_a(void);
int unit_b(void);

int main(void)
{
    return unit_a() || unit_b();
}
