// What becomes of objects with threads in the child of a fork, which has none of the threads.
#pragma once

namespace thl {

// How many forks lie between the process that loaded this and the one that asks.
unsigned forks();

// Notes the process in which an object was made.
class Origin {
public:
    // Whether a fork has brought the object into this process: its threads stayed behind, its locks may be held for
    // ever, and its condition variables wait for threads that never wake.
    bool inherited() const { return made_after_ != forks(); }

private:
    const unsigned made_after_ = forks();
};

// Deletes an object, or, if it is `inherited()`, lets it give back what it can and leaves the rest where it is.
struct DeletedWhereMade {
    template <typename T>
    void operator()(T* object) const {
        if (object->inherited()) {
            object->abandon();
        } else {
            delete object;
        }
    }
};

}  // namespace thl
