// A mapped file that gets shorter, or whose file system fails or is full, ends the process that reads it with SIGBUS. This
// handler says which file it was before it leaves. It uses only what a signal handler may: open, read, write, _exit.

#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

namespace {

char before[512], after[512];
int exit_code;

// Reads a hexadecimal number and moves behind it.
uintptr_t number(const char*& at) {
    uintptr_t value = 0;
    for (;; ++at) {
        if (*at >= '0' && *at <= '9') value = value * 16 + (*at - '0');
        else if (*at >= 'a' && *at <= 'f') value = value * 16 + (*at - 'a' + 10);
        else return value;
    }
}

// The file of a line of /proc/self/maps if it covers the address: "start-end perms offset device inode   /path".
const char* covering(const char* line, uintptr_t address) {
    const char* at = line;
    const uintptr_t first = number(at);
    if (*at++ != '-') return nullptr;
    const uintptr_t end = number(at);
    return first <= address && address < end ? strchr(line, '/') : nullptr;
}

// Finds the file that is mapped at an address; lines longer than the buffer are cut.
bool mapped(uintptr_t address, char* line, size_t room) {
    const int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (maps < 0) return false;
    char chunk[1024];
    size_t length = 0;
    bool found = false;
    for (ssize_t got; !found && (got = read(maps, chunk, sizeof chunk)) > 0;) {
        for (ssize_t i = 0; i < got && !found; ++i) {
            if (chunk[i] != '\n') {
                if (length + 1 < room) line[length++] = chunk[i];
                continue;
            }
            line[length] = 0;
            length = 0;
            if (const char* path = covering(line, address)) {
                memmove(line, path, strlen(path) + 1);
                found = true;
            }
        }
    }
    close(maps);
    return found;
}

void say(const char* text) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) return;
}

void on_bus_error(int number, siginfo_t* info, void*) {
    char line[4352];
    if (info->si_code <= 0 || !mapped(reinterpret_cast<uintptr_t>(info->si_addr), line, sizeof line)) {
        signal(number, SIG_DFL);  // not about a file: the default, with a core file where the user wants one
        raise(number);
        return;
    }
    say(before);
    say(line);
    say(after);
    _exit(exit_code);
}

}  // namespace

extern "C" int guard(const char* words_before, const char* words_after, int code) {
    strncpy(before, words_before, sizeof before - 1);
    strncpy(after, words_after, sizeof after - 1);
    exit_code = code;
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_RESETHAND;
    return sigaction(SIGBUS, &action, nullptr);
}
