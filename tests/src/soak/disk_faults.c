/* A disk that is slow, fails or holds still: loaded before ferry's C library (LD_PRELOAD).
 *
 * FERRY_DISK_FAULTS names a file of eight 64-bit words that the test reads and writes. Only regular
 * files of that file's own file system are meant: guest memory (memfd) is not. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MODE, CALLS, HOLD_AT, HELD, SYNCS, HOLD_SYNC_AT };
enum { NORMAL, SLOW, FAILING };

static volatile uint64_t *words;
static dev_t device;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FERRY_DISK_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct stat its;
    if (fd < 0)
        return;
    if (fstat(fd, &its) == 0) {
        void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) {
            device = its.st_dev;
            words = page;
        }
    }
    close(fd);
}

static void wait_ms(long ms)
{
    struct timespec time = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&time, NULL);
}

/* A vCPU uses no disk, and the sandbox ends a vCPU's thread that calls fstat. */
static int of_a_vcpu(void)
{
    char name[16] = "";
    return prctl(PR_GET_NAME, name) == 0 && strncmp(name, "vcpu", 4) == 0;
}

/* Non-zero: the call is to fail. */
static int fault(int fd, int sync)
{
    struct stat its;
    int saved = errno;
    if (!words || of_a_vcpu() || fstat(fd, &its) != 0 || !S_ISREG(its.st_mode) || its.st_dev != device) {
        errno = saved;
        return 0;
    }
    errno = saved;
    uint64_t call = __atomic_add_fetch(&words[sync ? SYNCS : CALLS], 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint64_t at = words[sync ? HOLD_SYNC_AT : HOLD_AT];
        if (at == 0 || call < at)
            break;
        words[HELD] = 1;
        wait_ms(1);
    }
    if (words[MODE] == SLOW)
        wait_ms(sync ? 150 : 15);
    if (words[MODE] == FAILING) {
        errno = EIO;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_FILE(type, name, parameters, arguments, sync)      \
    type name parameters                                      \
    {                                                         \
        static __typeof__(&name) real;                        \
        if (!real)                                            \
            real = REAL(name);                                \
        return fault(fd, sync) ? -1 : real arguments;         \
    }

ON_FILE(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), 0)
ON_FILE(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), 0)
ON_FILE(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t at), (fd, b, n, at), 0)
ON_FILE(ssize_t, pread64, (int fd, void *b, size_t n, off64_t at), (fd, b, n, at), 0)
ON_FILE(ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), 0)
ON_FILE(ssize_t, preadv64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), 0)
ON_FILE(int, fdatasync, (int fd), (fd), 1)
ON_FILE(int, fsync, (int fd), (fd), 1)
