// The folder of a run. It is created if it is missing, and it is locked before anything in it is read. So no
// other run can change what this one has seen there until it ends.
#pragma once
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include "llmc/error.h"
#include "llmc/files.h"

class RunFolder {
  public:
    explicit RunFolder(const std::string& path) : path_(path) {
        do {
            make(path_);
            if (lock_.fd >= 0) ::close(lock_.fd);
            lock_.fd = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (lock_.fd < 0 && errno == ENOENT) continue;
            if (lock_.fd < 0) fail_errno(path_, "cannot open folder");
            if (!lock()) {
                keep();  // the folder belongs to that run now, even if it was created here
                fail(path_, ": another train_gpt is training in this folder");
            }
        } while (!is_locked());
    }

    // From now on the folder stays, even after a failure. Without this call, the destructor removes it if it
    // was created here.
    void keep() { made_.folders.clear(); }

  private:
    struct Made {
        std::vector<std::string> folders;  // outer folders before inner ones
        ~Made() {
            // rmdir does not remove a folder that has something in it.
            for (size_t i = folders.size(); i-- > 0;) ::rmdir(folders[i].c_str());
        }
    };

    void make(const std::filesystem::path& folder) {
        std::error_code error;
        if (std::filesystem::exists(folder, error)) return;
        if (!error && folder.has_parent_path()) make(folder.parent_path());
        if (!error && std::filesystem::create_directory(folder, error)) {
            made_.folders.push_back(folder.string());
            sync_folder(parent_folder(folder.string()));
        }
        if (error) fail(path_, ": cannot create: ", error.message());
    }

    // False if another run has the lock. A program that only reads the folder has the lock for a moment
    // (is_training_in), so this tries several times. A filesystem without locks counts as no other run.
    bool lock() const {
        for (int attempt = 0; ::flock(lock_.fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK; attempt++) {
            if (attempt == 20) return false;
            usleep(5000);
        }
        return true;
    }

    // Whether the locked folder still has this name. A run that failed at its start may have removed it in
    // the meantime.
    bool is_locked() const {
        struct stat locked, named;
        if (::fstat(lock_.fd, &locked) != 0 || ::stat(path_.c_str(), &named) != 0) return false;
        return locked.st_dev == named.st_dev && locked.st_ino == named.st_ino;
    }

    const std::string path_;
    Descriptor lock_{-1};
    Made made_;  // destroyed first, while the folder is still locked
};
