from keras_pdattn.cli import main

main()
